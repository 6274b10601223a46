"""Small models of images in people's packages: for bench/zoo_repositories.py."""

from __future__ import annotations

import torch
from zoo_rows import SAMPLES, beside, ids, part, row

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
        "DeepLabV3Plus",
        "UPerNet",
        "Segformer",
    )
}
SEGMENTATION["segmentation-models-pytorch PSPNet"] = row(
    smp + "PSPNet", IMAGE, encoder_depth=5, upsampling=32, **plain_smp
)
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
        "pytorchcv simplepose_resnet18_coco": row(
            cv, IMAGE, name="simplepose_resnet18_coco", return_heatmap=True
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
        "doctr.models.recognition:crnn_mobilenet_v3_small",
        (3, 32, 128),
        pretrained_backbone=False,
        exportable=True,
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
        net + "SwinUNETR", (1, 64, 64), spatial_dims=2, in_channels=1, out_channels=2, feature_size=12
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
    "monai VNet": row(net + "VNet", (1, 32, 32), spatial_dims=2, dropout_dim=2),
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
