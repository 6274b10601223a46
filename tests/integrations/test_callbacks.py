"""What the scripts of docs/training do not show: other models, options, and mistakes."""

import pytest
import torch
from helpers.networks import batch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ocsfast import ConfigError, StateError


def test_a_vision_transformer_reads_what_it_saved(tmp_path):
    """With uniform=True the config says what is left."""
    transformers = pytest.importorskip("transformers")
    from ocsfast.integrations.transformers import PruneCallback

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.ViTConfig(
        **sizes, intermediate_size=128, image_size=16, patch_size=4, num_labels=3
    )
    torch.manual_seed(0)
    model = transformers.ViTForImageClassification(config)
    images = torch.randn(64, 3, 16, 16)
    data = [{"pixel_values": x, "labels": k % 3} for k, x in enumerate(images)]
    prune = PruneCallback(0.3, {"pixel_values": images[:2]}, uniform=True)
    arguments = transformers.TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=60,
        per_device_train_batch_size=16,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    transformers.Trainer(model, arguments, train_dataset=data, callbacks=[prune]).train()
    report = prune.run.report
    assert report.stage == "pruned"
    assert 10 * report.cost <= 7 * report.cost_dense
    model.save_pretrained(tmp_path / "saved")
    again = transformers.ViTForImageClassification.from_pretrained(tmp_path / "saved")
    assert again.config.intermediate_size < 128
    assert torch.equal(again.eval()(images[:4]).logits, model.eval()(images[:4]).logits)


def bert(folder, **arguments):
    """A Trainer's model and what else it takes."""
    transformers = pytest.importorskip("transformers")
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 99}
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(
        transformers.BertConfig(**sizes, intermediate_size=32, max_position_embeddings=8)
    )
    data = [{"input_ids": x, "labels": k % 2} for k, x in enumerate(torch.randint(1, 99, (32, 8)))]
    options = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        **arguments,
    )
    return {"model": model, "args": options, "train_dataset": data, "eval_dataset": data[:4]}


def test_the_best_checkpoint_is_one_of_the_cut_model(tmp_path):
    """Here the dense model's is the better one by far, but the cut one cannot load it."""
    made = bert(
        tmp_path,
        max_steps=5,
        eval_strategy="steps",
        eval_steps=1,
        save_strategy="steps",
        save_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
    )
    from transformers import Trainer

    from ocsfast.integrations.transformers import PruneCallback

    class Worsening(Trainer):
        def evaluate(self, *args, **kwargs):
            metrics = {"eval_loss": float(self.state.global_step)}
            self.control = self.callback_handler.on_evaluate(
                self.args, self.state, self.control, metrics
            )
            return metrics

    prune = PruneCallback(0.5, {"input_ids": torch.ones(1, 8).long()}, check_every=1, deadline=3)
    trainer = Worsening(**made, callbacks=[prune])
    trainer.train()
    assert prune.run.pruner.steps == 3
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-3")
    assert made["model"].bert.encoder.layer[0].intermediate.dense.out_features < 32


def test_epochs_of_a_run_of_which_the_trainer_knows_a_part(tmp_path):
    """32 examples in batches of 4, two of them a step: 4 steps an epoch."""
    made = bert(tmp_path, max_steps=2, gradient_accumulation_steps=2, save_strategy="no")
    from transformers import Trainer

    from ocsfast.integrations.transformers import PruneCallback

    prune = PruneCallback(0.5, {"input_ids": torch.ones(1, 8).long()}, epochs=25)
    Trainer(**made, callbacks=[prune]).train()
    config = prune.run.pruner.config
    assert (config.epochs, config.total_steps, config.check_every) == (None, 100, "auto")


def test_gradients_are_there_at_a_check_of_the_trainer(tmp_path, caplog):
    """One check an optimizer step, whether or not it takes several batches."""
    made = bert(tmp_path, max_steps=4, gradient_accumulation_steps=2, save_strategy="no")
    from transformers import Trainer

    from ocsfast.integrations.transformers import PruneCallback

    example = {"input_ids": torch.ones(1, 8).long()}
    prune = PruneCallback(0.5, example, criterion="taylor", check_every=1, deadline=3)
    Trainer(**made, callbacks=[prune]).train()
    assert prune.run.report.stage == "pruned"
    assert (prune.run.pruner.steps, prune.run.pruner.t_cut) == (3, 3)
    assert "add_callback" not in caplog.text


def test_a_callback_that_comes_too_late_to_resume_says_so(tmp_path, caplog):
    made = bert(tmp_path, max_steps=1, save_strategy="no")
    from transformers import Trainer

    from ocsfast.integrations.transformers import PruneCallback

    trainer = Trainer(**made)
    trainer.add_callback(PruneCallback(0.5, {"input_ids": torch.ones(1, 8).long()}))
    trainer.train()
    assert "not to Trainer.add_callback" in caplog.text


def lightning_module(optimizers=1):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Flatten(), nn.Linear(192, 16), nn.ReLU(), nn.Linear(16, 5))

        def training_step(self, batch, _):
            x, y = batch
            return nn.functional.cross_entropy(self.net(x), y)

        def configure_optimizers(self):
            made = [torch.optim.SGD(self.parameters(), lr=0.1) for _ in range(optimizers)]
            return made if optimizers > 1 else made[0]

    if optimizers > 1:
        Module.automatic_optimization = False
    return lightning, Module()


def fit(lightning, module, *callbacks, **options):
    trainer = lightning.Trainer(
        accelerator="cpu",
        max_epochs=2,
        callbacks=list(callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"enable_checkpointing": False, **options},
    )
    trainer.fit(module, DataLoader(TensorDataset(*batch(0)), batch_size=4))
    return trainer


def test_lightning_mistakes():
    lightning, module = lightning_module()
    from ocsfast.integrations.lightning import PruneCallback

    x = batch(0)[0][:2]
    with pytest.raises(ConfigError, match=r"module='model': Module has no such part; it has net"):
        fit(lightning, module, PruneCallback(0.5, x))
    with pytest.raises(ConfigError, match="ratio"):
        fit(lightning, module, PruneCallback(50, x, module="net"))
    _, two = lightning_module(optimizers=2)
    with pytest.raises(StateError, match="configure_optimizers returns 2 optimizers"):
        fit(lightning, two, PruneCallback(0.5, x, module="net"))


def test_lightning_accumulates():
    lightning, module = lightning_module()
    from ocsfast.integrations.lightning import PruneCallback

    callback = PruneCallback(0.5, batch(0)[0][:2], module="net", check_every=1, deadline=2)
    fit(lightning, module, callback, accumulate_grad_batches=2)
    assert callback.run.report.stage == "pruned"
    assert module.net[1].out_features < 16
    assert callback.run.pruner.steps == 2


def test_epochs_of_a_run_of_which_lightning_knows_a_part():
    """8 examples in batches of 4; `max_epochs` is 2."""
    lightning, module = lightning_module()
    from ocsfast.integrations.lightning import PruneCallback

    callback = PruneCallback(0.5, batch(0)[0][:2], module="net", epochs=30)
    fit(lightning, module, callback)
    assert callback.run.pruner.config.total_steps == 60


def test_lightning_reads_the_best_cut_model(tmp_path):
    """Here the dense model's checkpoint is the better one. A fresh model reads the cut one's, too."""
    lightning, module = lightning_module()
    from lightning.pytorch.callbacks import ModelCheckpoint

    from ocsfast.integrations.lightning import PruneCallback

    class Tested(type(module)):
        def training_step(self, batch, _):
            self.log("score", float(self.global_step))
            return super().training_step(batch, _)

        def test_step(self, batch, index):
            self.log("loss", super().training_step(batch, index))

    x, y = batch(0)
    loader = DataLoader(TensorDataset(x, y), batch_size=4)
    module = Tested()
    steps = len(loader)
    prune = PruneCallback(0.5, x[:2], module="net", check_every=1, deadline=steps + 1)
    best = ModelCheckpoint(tmp_path, monitor="score", mode="min")
    trainer = fit(lightning, module, prune, best, enable_checkpointing=True)
    assert prune.run.pruner.steps == steps + 1
    assert len(list(tmp_path.iterdir())) == 2
    after = trainer.test(module, loader, ckpt_path="best", verbose=False)
    fresh = lightning.Trainer(
        accelerator="cpu",
        callbacks=[PruneCallback(0.5, x[:2], module="net")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    assert fresh.test(Tested(), loader, ckpt_path=best.best_model_path, verbose=False) == after
