"""Models of people's own packages, small instances with random weights: what bench/models.py groups beside
the big libraries. bench/requirements-zoo.txt has the versions, and says how to install them.

A line is a name, "module:class or function", what the model is called with, and its options. An input is a
shape without the samples, or `ids` below.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]
Input = tuple[int, ...] | Callable[[], Any]
SAMPLES = 2


def ids(limit: int, *shape: int) -> Callable[[], Tensor]:
    """Integers below a limit: tokens, categories, or time steps."""
    return lambda: torch.randint(0, limit, (SAMPLES, *shape))


def found(where: str) -> Any:
    """ "package.module:name" -> what has that name."""
    module, _, name = where.partition(":")
    value = importlib.import_module(module)
    for part in name.split("."):
        value = getattr(value, part)
    return value


def made(where: str, inputs: tuple[Input, ...], options: dict[str, Any]) -> Call:
    """An option that is a function is called first: it makes a part of the model, such as its config."""
    given = {key: value() if isinstance(value, partial) else value for key, value in options.items()}
    args = tuple(x() if callable(x) else torch.randn(SAMPLES, *x) for x in inputs)
    return found(where)(**given), args, {}


def part(where: str, *args: Any, **options: Any) -> partial[Any]:
    """Another object of a package, made when the model is."""

    def make() -> Any:
        values = [value() if isinstance(value, partial) else value for value in args]
        named = {key: value() if isinstance(value, partial) else value for key, value in options.items()}
        return found(where)(*values, **named)

    return partial(make)


def beside(module: str, name: str) -> partial[str]:
    """The path of a file that lies where a module of a package does."""
    return partial(lambda: str(Path(found(module + ":__file__")).parent / name))


def row(where: str, *inputs: Input, **options: Any) -> Callable[[], Call]:
    return partial(made, where, inputs, options)


# -- images -------------------------------------------------------------------------------------

IMAGE = (3, 64, 64)
smp = "segmentation_models_pytorch:"
plain_smp = {"encoder_name": "resnet18", "encoder_weights": None}
SEGMENTATION = {
    f"segmentation-models-pytorch {name}": row(smp + name, IMAGE, **plain_smp)
    for name in (
        "Unet",
        "UnetPlusPlus",
        "MAnet",
        "Linknet",
        "FPN",
        "PSPNet",
        "DeepLabV3Plus",
        "UPerNet",
        "Segformer",
    )
}
SEGMENTATION["segmentation-models-pytorch PAN"] = row(smp + "PAN", (3, 128, 128), **plain_smp)

sr = "spandrel.architectures."
RESTORATION = {
    "spandrel SwinIR": row(
        sr + "SwinIR:SwinIR",
        (3, 16, 16),
        img_size=16,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        upscale=2,
        upsampler="pixelshuffle",
    ),
    "spandrel Swin2SR": row(
        sr + "Swin2SR:Swin2SR",
        (3, 16, 16),
        img_size=16,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        upscale=2,
        upsampler="pixelshuffle",
    ),
    "spandrel HAT": row(
        sr + "HAT:HAT",
        (3, 16, 16),
        img_size=16,
        embed_dim=24,
        depths=[2, 2],
        num_heads=[2, 2],
        window_size=4,
        upscale=2,
        squeeze_factor=6,
    ),
    "spandrel DAT": row(
        sr + "DAT:DAT",
        (3, 16, 16),
        img_size=16,
        embed_dim=24,
        split_size=[2, 4],
        depth=[2, 2],
        num_heads=[2, 2],
    ),
    "spandrel RRDBNet": row(
        sr + "ESRGAN.__arch.RRDB:RRDBNet", (3, 16, 16), num_filters=16, num_blocks=2, in_nc=3, out_nc=3
    ),
    "spandrel NAFNet": row(
        sr + "NAFNet:NAFNet", IMAGE, width=16, enc_blk_nums=[1, 1], dec_blk_nums=[1, 1]
    ),
    "spandrel SRVGGNetCompact": row(
        sr + "Compact.__arch.SRVGG:SRVGGNetCompact", (3, 16, 16), num_feat=16, num_conv=3
    ),
    "spandrel SPAN": row(
        sr + "SPAN:SPAN", (3, 16, 16), num_in_ch=3, num_out_ch=3, feature_channels=16, upscale=2
    ),
    "spandrel OmniSR": row(sr + "OmniSR:OmniSR", (3, 16, 16), num_feat=16, up_scale=2),
    "spandrel SCUNet": row(sr + "SCUNet:SCUNet", IMAGE, config=[1] * 7, dim=64, input_resolution=64),
    "spandrel PLKSR": row(sr + "PLKSR:PLKSR", (3, 16, 16), dim=16, n_blocks=2, upscaling_factor=2),
    "spandrel SAFMN": row(sr + "SAFMN:SAFMN", (3, 16, 16), dim=16, n_blocks=2, upscaling_factor=2),
    "spandrel RCAN": row(
        sr + "RCAN:RCAN", (3, 16, 16), n_resgroups=2, n_resblocks=2, n_feats=16, reduction=4, scale=2
    ),
    "super-image EDSR": row(
        "super_image:EdsrModel",
        (3, 16, 16),
        args=part("super_image:EdsrConfig", scale=2, n_resblocks=2, n_feats=16),
    ),
    "monai Restormer": row("monai.networks.nets.restormer:Restormer", IMAGE, dim=16),
}

cv = "pytorchcv.model_provider:get_model"
PYTORCHCV = (
    {
        f"pytorchcv {name}": row(cv, (3, side, side), name=name)
        for name, side in (
            ("simplepose_resnet18_coco", 64),
            ("alphapose_fastseresnet101b_coco", 64),
            ("lwopenpose2d_mobilenet_cmupan_coco", 64),
            ("centernet_resnet18_coco", 64),
            ("cgnet_cityscapes", 64),
            ("dabnet_cityscapes", 64),
            ("erfnet_cityscapes", 64),
            ("condensenet74_c4_g4", 224),
            ("octresnet10_ad2", 224),
            ("msdnet22", 224),
            ("airnet50_1x64d_r2", 224),
            ("revnet38", 224),
        )
    }
    | {
        f"pytorchcv {name}": row(cv, (3, 128, 128), name=name, in_size=(128, 128))
        for name in (
            "bisenet_resnet18_celebamaskhq",
            "fastscnn_cityscapes",
            "icnet_resnetd50b_cityscapes",
        )
    }
    | {
        "pytorchcv quartznet5x5_en_ls": row(
            cv, (64, 64), lambda: torch.tensor([64, 64]), name="quartznet5x5_en_ls", from_audio=False
        ),
        "pytorchcv raft_small": row(cv, (3, 128, 128), (3, 128, 128), name="raft_small"),
    }
)

VISION = {
    "efficientnet-pytorch EfficientNet-b0": row(
        "efficientnet_pytorch:EfficientNet.from_name", IMAGE, model_name="efficientnet-b0"
    ),
    "facenet-pytorch InceptionResnetV1": row(
        "facenet_pytorch:InceptionResnetV1", (3, 96, 96), classify=True, num_classes=10
    ),
    "torchreid osnet_x0_25": row(
        "torchreid.reid.models.osnet:osnet_x0_25", (3, 64, 32), num_classes=10, pretrained=False
    ),
    "kornia HardNet": row("kornia.feature:HardNet", (1, 32, 32), pretrained=False),
    "segment-anything image encoder": row(
        "segment_anything.modeling:ImageEncoderViT",
        IMAGE,
        img_size=64,
        embed_dim=32,
        depth=2,
        num_heads=2,
        out_chans=16,
        use_rel_pos=True,
        window_size=2,
        global_attn_indexes=(1,),
    ),
    "yolov5 n": row("yolov5.models.yolo:Model", IMAGE, cfg=beside("yolov5.models.yolo", "yolov5n.yaml")),
    "easyocr CRAFT": row("easyocr.craft:CRAFT", IMAGE),
    "easyocr CRNN": row(
        "easyocr.model.vgg_model:Model",
        (1, 32, 64),
        ids(10, 4),
        input_channel=1,
        output_channel=64,
        hidden_size=32,
        num_class=20,
    ),
    "python-doctr crnn_mobilenet_v3_small": row(
        "doctr.models.recognition:crnn_mobilenet_v3_small", (3, 32, 128), pretrained_backbone=False
    ),
    "open-clip CLIP": row(
        "open_clip.model:CLIP",
        IMAGE,
        ids(100, 16),
        embed_dim=32,
        vision_cfg=part(
            "open_clip.model:CLIPVisionCfg", layers=2, width=64, head_width=16, image_size=64
        ),
        text_cfg=part(
            "open_clip.model:CLIPTextCfg", context_length=16, vocab_size=100, width=64, heads=4, layers=2
        ),
    ),
    "vit-pytorch MaxViT": row(
        "vit_pytorch.max_vit:MaxViT", IMAGE, num_classes=10, dim=32, depth=(1, 1), window_size=4
    ),
    "vit-pytorch CvT": row(
        "vit_pytorch.cvt:CvT",
        IMAGE,
        num_classes=10,
        s3_depth=1,
        s1_emb_dim=16,
        s2_emb_dim=32,
        s3_emb_dim=32,
    ),
    "vit-pytorch CrossFormer": row(
        "vit_pytorch.crossformer:CrossFormer",
        (3, 224, 224),
        num_classes=10,
        dim=(32, 32, 64, 64),
        depth=(1, 1, 1, 1),
    ),
    "vit-pytorch ViT": row(
        "vit_pytorch:ViT",
        IMAGE,
        image_size=64,
        patch_size=16,
        num_classes=10,
        dim=32,
        depth=2,
        heads=4,
        mlp_dim=64,
        dim_head=16,
    ),
    "vit-pytorch CCT": row(
        "vit_pytorch.cct:CCT",
        IMAGE,
        img_size=64,
        embedding_dim=32,
        num_layers=2,
        num_heads=2,
        num_classes=10,
    ),
    "vit-pytorch ViViT": row(
        "vit_pytorch.vivit:ViViT",
        (3, 4, 32, 32),
        image_size=32,
        frames=4,
        image_patch_size=8,
        frame_patch_size=2,
        num_classes=10,
        dim=32,
        spatial_depth=1,
        temporal_depth=1,
        heads=4,
        mlp_dim=64,
    ),
    "stable-baselines3 NatureCNN": row(
        "stable_baselines3.common.policies:ActorCriticCnnPolicy",
        lambda: torch.randint(0, 255, (SAMPLES, 4, 64, 64), dtype=torch.uint8),
        observation_space=part(
            "gymnasium.spaces:Box", 0, 255, (4, 64, 64), part("numpy:dtype", "uint8")
        ),
        action_space=part("gymnasium.spaces:Discrete", 4),
        lr_schedule=lambda progress: 1e-3,
    ),
    "compressai ScaleHyperprior": row("compressai.models:ScaleHyperprior", IMAGE, N=16, M=24),
    "compressai Cheng2020Attention": row("compressai.models:Cheng2020Attention", IMAGE, N=16),
}

# -- medical images ------------------------------------------------------------------------------

net = "monai.networks.nets:"
VOLUME = (1, 32, 32, 32)
MEDICAL = {
    "monai UNet": row(
        net + "UNet",
        VOLUME,
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(8, 16, 32),
        strides=(2, 2),
        num_res_units=2,
    ),
    "monai SwinUNETR": row(
        net + "SwinUNETR", (1, 64, 64, 64), in_channels=1, out_channels=2, feature_size=12
    ),
    "monai UNETR": row(
        net + "UNETR",
        VOLUME,
        in_channels=1,
        out_channels=2,
        img_size=32,
        feature_size=8,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
    ),
    "monai SegResNet": row(net + "SegResNet", VOLUME),
    "monai DynUNet": row(
        net + "DynUNet",
        VOLUME,
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        kernel_size=[3, 3, 3],
        strides=[1, 2, 2],
        upsample_kernel_size=[2, 2],
        filters=[8, 16, 32],
    ),
    "monai AttentionUnet": row(
        net + "AttentionUnet",
        VOLUME,
        spatial_dims=3,
        in_channels=1,
        out_channels=2,
        channels=(8, 16, 32),
        strides=(2, 2),
    ),
    "monai VNet": row(net + "VNet", VOLUME),
    "monai DiffusionModelUNet": row(
        net + "DiffusionModelUNet",
        (1, 32, 32),
        ids(1000),
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(16, 32),
        attention_levels=(False, True),
        num_res_blocks=1,
        norm_num_groups=8,
    ),
    "monai AutoencoderKL": row(
        net + "AutoencoderKL",
        (1, 32, 32),
        spatial_dims=2,
        channels=(16, 32),
        attention_levels=(False, True),
        num_res_blocks=1,
        norm_num_groups=8,
    ),
    "monai VQVAE": row(
        net + "VQVAE",
        (1, 32, 32),
        spatial_dims=2,
        in_channels=1,
        out_channels=1,
        channels=(16, 32),
        num_res_channels=(16, 32),
        num_res_layers=1,
        downsample_parameters=((2, 4, 1, 1), (2, 4, 1, 1)),
        upsample_parameters=((2, 4, 1, 1, 0), (2, 4, 1, 1, 0)),
        num_embeddings=32,
        embedding_dim=16,
    ),
}

# -- generation ------------------------------------------------------------------------------------

GENERATION = {
    "denoising-diffusion-pytorch Unet": row(
        "denoising_diffusion_pytorch:Unet", (3, 32, 32), ids(1000), dim=16, dim_mults=(1, 2)
    ),
    "x-unet XUnet": row(
        "x_unet:XUnet",
        (3, 32, 32),
        dim=16,
        dim_mults=(1, 2),
        num_blocks_per_stage=(1, 1),
        num_self_attn_per_stage=(0, 1),
        nested_unet_depths=(1, 0),
    ),
    "diffusers UNet2DConditionModel": row(
        "diffusers:UNet2DConditionModel",
        (4, 16, 16),
        ids(1000),
        (8, 32),
        block_out_channels=(32, 64),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=32,
        attention_head_dim=8,
    ),
    "diffusers DiTTransformer2DModel": row(
        "diffusers:DiTTransformer2DModel",
        (4, 8, 8),
        ids(1000),
        ids(10),
        num_attention_heads=2,
        attention_head_dim=16,
        in_channels=4,
        num_layers=2,
        sample_size=8,
        num_embeds_ada_norm=10,
        norm_num_groups=8,
    ),
    "diffusers AutoencoderKL": row(
        "diffusers:AutoencoderKL",
        (3, 32, 32),
        block_out_channels=(32, 64),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        latent_channels=4,
    ),
}

# -- sound -----------------------------------------------------------------------------------------

SOUND = {
    "torchaudio Conformer": row(
        "torchaudio.models:Conformer",
        (20, 32),
        lambda: torch.tensor([20, 20]),
        input_dim=32,
        num_heads=4,
        ffn_dim=64,
        num_layers=2,
        depthwise_conv_kernel_size=5,
    ),
    "torchaudio ConvTasNet": row(
        "torchaudio.models:ConvTasNet",
        (1, 400),
        enc_num_feats=32,
        msk_num_feats=16,
        msk_num_hidden_feats=32,
        msk_num_layers=2,
        msk_num_stacks=2,
    ),
    "torchaudio HDemucs": row(
        "torchaudio.models:HDemucs", (2, 16384), sources=["a", "b"], channels=8, nfft=1024, depth=4
    ),
    "torchaudio DeepSpeech": row("torchaudio.models:DeepSpeech", (1, 20, 16), n_feature=16, n_hidden=32),
    "torchaudio Wav2Letter": row("torchaudio.models:Wav2Letter", (1, 4000)),
    "torchaudio wav2vec2": row(
        "torchaudio.models:wav2vec2_model",
        (1600,),
        extractor_mode="group_norm",
        extractor_conv_layer_config=[(16, 10, 5), (16, 3, 2)],
        extractor_conv_bias=False,
        encoder_embed_dim=32,
        encoder_projection_dropout=0.0,
        encoder_pos_conv_kernel=16,
        encoder_pos_conv_groups=4,
        encoder_num_layers=2,
        encoder_num_heads=4,
        encoder_attention_dropout=0.0,
        encoder_ff_interm_features=64,
        encoder_ff_interm_dropout=0.0,
        encoder_dropout=0.0,
        encoder_layer_norm_first=False,
        encoder_layer_drop=0.0,
        aux_num_out=10,
    ),
    "speechbrain ECAPA_TDNN": row(
        "speechbrain.lobes.models.ECAPA_TDNN:ECAPA_TDNN",
        (40, 20),
        input_size=20,
        channels=[32, 32, 32, 32, 96],
        attention_channels=16,
        se_channels=16,
        lin_neurons=16,
    ),
    "speechbrain Xvector": row(
        "speechbrain.lobes.models.Xvector:Xvector",
        (40, 20),
        in_channels=20,
        tdnn_channels=[32, 32, 32, 32, 64],
        lin_neurons=32,
    ),
    "speechbrain HifiganGenerator": row(
        "speechbrain.lobes.models.HifiGAN:HifiganGenerator",
        (20, 16),
        in_channels=20,
        out_channels=1,
        resblock_type="1",
        resblock_dilation_sizes=[[1, 3, 5]],
        resblock_kernel_sizes=[3],
        upsample_kernel_sizes=[8, 4],
        upsample_initial_channel=32,
        upsample_factors=[4, 2],
    ),
    "asteroid DPRNNTasNet": row(
        "asteroid.models:DPRNNTasNet",
        (800,),
        n_src=2,
        n_repeats=1,
        bn_chan=16,
        hid_size=16,
        chunk_size=20,
        n_filters=16,
    ),
    "asteroid ConvTasNet": row(
        "asteroid.models:ConvTasNet",
        (800,),
        n_src=2,
        n_blocks=2,
        n_repeats=1,
        bn_chan=16,
        hid_chan=32,
        skip_chan=16,
        n_filters=32,
    ),
    "demucs Demucs": row("demucs.demucs:Demucs", (2, 4096), sources=["a", "b"], channels=8, depth=3),
    "encodec SEANetEncoder": row(
        "encodec.modules:SEANetEncoder", (1, 640), n_filters=8, dimension=32, ratios=[4, 2], norm="none"
    ),
    "encodec SEANetDecoder": row(
        "encodec.modules:SEANetDecoder", (32, 20), n_filters=8, dimension=32, ratios=[4, 2]
    ),
    "descript-audio-codec DAC": row(
        "dac.model.dac:DAC",
        (1, 1024),
        encoder_dim=8,
        encoder_rates=[2, 4],
        decoder_dim=32,
        decoder_rates=[4, 2],
        n_codebooks=2,
        codebook_size=16,
        sample_rate=16000,
    ),
    "vocos VocosBackbone": row(
        "vocos.models:VocosBackbone",
        (20, 16),
        input_channels=20,
        dim=32,
        intermediate_dim=64,
        num_layers=2,
    ),
    "openai-whisper Whisper": row(
        "whisper.model:Whisper",
        (20, 32),
        ids(50, 8),
        dims=part("whisper.model:ModelDimensions", 20, 16, 32, 4, 2, 50, 8, 32, 4, 2),
    ),
    "conformer Conformer": row("conformer:Conformer", (20, 32), dim=32, depth=2, dim_head=8, heads=4),
    "TTS MelganGenerator": row(
        "TTS.vocoder.models.melgan_generator:MelganGenerator",
        (20, 16),
        in_channels=20,
        base_channels=32,
        upsample_factors=(4, 2),
    ),
}

# -- tables, time series, graphs, points, games ------------------------------------------------------

fields = {
    "field_dims": part("numpy:array", [10, 20, 30]),
    "embed_dim": 16,
    "mlp_dims": (32, 32),
    "dropout": 0.1,
}
TABLES = {
    "pytorch-tabnet TabNet": row(
        "pytorch_tabnet.tab_network:TabNet",
        (16,),
        input_dim=16,
        output_dim=3,
        group_attention_matrix=part("torch:eye", 16),
    ),
    "rtdl FTTransformer": row(
        "rtdl_revisiting_models:FTTransformer",
        (8,),
        ids(4, 2),
        n_cont_features=8,
        cat_cardinalities=[4, 5],
        d_out=3,
        n_blocks=2,
        d_block=32,
        attention_n_heads=4,
        attention_dropout=0.0,
        ffn_d_hidden_multiplier=2,
        ffn_dropout=0.0,
        residual_dropout=0.0,
    ),
    "rtdl ResNet": row(
        "rtdl_revisiting_models:ResNet",
        (16,),
        d_in=16,
        d_out=3,
        n_blocks=2,
        d_block=32,
        d_hidden=64,
        d_hidden_multiplier=None,
        dropout1=0.1,
        dropout2=0.1,
    ),
    "tab-transformer-pytorch FTTransformer": row(
        "tab_transformer_pytorch:FTTransformer",
        ids(4, 3),
        (8,),
        categories=(4, 5, 6),
        num_continuous=8,
        dim=32,
        depth=2,
        heads=4,
    ),
    "pykan KAN": row("kan:KAN", (4,), width=[4, 8, 3], auto_save=False),
    "torchfm DeepFM": row("torchfm.model.dfm:DeepFactorizationMachineModel", ids(10, 3), **fields),
    "torchfm DCN": row("torchfm.model.dcn:DeepCrossNetworkModel", ids(10, 3), num_layers=2, **fields),
    "torchfm xDeepFM": row(
        "torchfm.model.xdfm:ExtremeDeepFactorizationMachineModel",
        ids(10, 3),
        cross_layer_sizes=(16, 16),
        **fields,
    ),
    "torchfm AutoInt": row(
        "torchfm.model.afi:AutomaticFeatureInteractionModel",
        ids(10, 3),
        field_dims=part("numpy:array", [10, 20, 30]),
        embed_dim=16,
        atten_embed_dim=32,
        num_heads=2,
        num_layers=2,
        mlp_dims=(32, 32),
        dropouts=(0.1, 0.1, 0.1),
    ),
    "nbeats-pytorch NBeatsNet": row(
        "nbeats_pytorch.model:NBeatsNet",
        (10,),
        stack_types=("generic", "generic"),
        hidden_layer_units=32,
    ),
    "torch-geometric GCN": row(
        "torch_geometric.nn.models:GCN",
        lambda: torch.randn(12, 16),
        lambda: torch.randint(0, 12, (2, 30)),
        in_channels=16,
        hidden_channels=32,
        num_layers=2,
        out_channels=4,
    ),
    "torch-geometric GAT": row(
        "torch_geometric.nn.models:GAT",
        lambda: torch.randn(12, 16),
        lambda: torch.randint(0, 12, (2, 30)),
        in_channels=16,
        hidden_channels=32,
        num_layers=2,
        out_channels=4,
        heads=4,
    ),
    "egnn-pytorch EGNN_Network": row(
        "egnn_pytorch:EGNN_Network", ids(10, 8), (8, 3), num_tokens=10, dim=32, depth=2
    ),
    "point-transformer-pytorch PointTransformerLayer": row(
        "point_transformer_pytorch:PointTransformerLayer", (8, 32), (8, 3), dim=32
    ),
    "openpoints Point_Transformer_Last": row(
        "openpoints.models.backbone.pct:Point_Transformer_Last", (32, 16), channels=32
    ),
}

# -- long sequences ----------------------------------------------------------------------------------

layers = {"dim": 32, "depth": 2, "heads": 4, "attn_dim_head": 8}
SEQUENCES = {
    "x-transformers Decoder": row(
        "x_transformers:TransformerWrapper",
        ids(50, 16),
        num_tokens=50,
        max_seq_len=16,
        attn_layers=part("x_transformers:Decoder", **layers),
    ),
    "x-transformers Decoder rotary, GLU, RMSNorm": row(
        "x_transformers:TransformerWrapper",
        ids(50, 16),
        num_tokens=50,
        max_seq_len=16,
        attn_layers=part(
            "x_transformers:Decoder",
            **layers,
            rotary_pos_emb=True,
            ff_glu=True,
            use_rmsnorm=True,
            attn_kv_heads=2,
        ),
    ),
    "linformer Linformer": row(
        "linformer:Linformer", (16, 32), dim=32, seq_len=16, depth=2, k=8, heads=4
    ),
    "performer-pytorch PerformerLM": row(
        "performer_pytorch:PerformerLM",
        ids(50, 16),
        num_tokens=50,
        max_seq_len=16,
        dim=32,
        depth=2,
        heads=4,
        dim_head=8,
    ),
    "perceiver-pytorch PerceiverIO": row(
        "perceiver_pytorch:PerceiverIO",
        (16, 32),
        dim=32,
        queries_dim=32,
        depth=2,
        num_latents=8,
        latent_dim=32,
        latent_heads=4,
        latent_dim_head=8,
        cross_dim_head=16,
    ),
    "reformer-pytorch ReformerLM": row(
        "reformer_pytorch:ReformerLM",
        ids(50, 32),
        num_tokens=50,
        dim=32,
        depth=2,
        max_seq_len=32,
        heads=4,
        bucket_size=8,
        use_full_attn=True,
    ),
    "xlstm mLSTM": row(
        "xlstm:xLSTMBlockStack",
        (16, 32),
        config=part(
            "xlstm:xLSTMBlockStackConfig",
            mlstm_block=part("xlstm:mLSTMBlockConfig"),
            context_length=16,
            num_blocks=2,
            embedding_dim=32,
        ),
    ),
    "slot-attention SlotAttention": row("slot_attention:SlotAttention", (16, 32), num_slots=4, dim=32),
    "nystrom-attention Nystromformer": row(
        "nystrom_attention:Nystromformer",
        (16, 32),
        dim=32,
        depth=2,
        dim_head=8,
        heads=4,
        num_landmarks=8,
    ),
}

MODELS: dict[str, Callable[[], Call]] = {
    **SEGMENTATION,
    **RESTORATION,
    **PYTORCHCV,
    **VISION,
    **MEDICAL,
    **GENERATION,
    **SOUND,
    **TABLES,
    **SEQUENCES,
}
