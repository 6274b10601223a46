"""Small models of sound, tables, series, graphs, points and text, for bench/zoo_repositories.py."""

from __future__ import annotations

import torch
from zoo_rows import ids, part, row

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
        lambda: None,
        (4, 32),
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
