"""The models that bench/models.py groups: one a family of each library, the smallest that there is.

A line is a name, the side of the input image, and arguments that make the model smaller.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torchvision
from torch import nn
from zoo_repositories import MODELS as REPOSITORIES
from zoo_transformers import MODELS, transformers_model

Call = tuple[nn.Module, tuple[Any, ...], dict[str, Any]]  # a model and what to call it with

TORCHVISION = """
alexnet 64
convnext_tiny 64
densenet121 64
efficientnet_b0 64
efficientnet_v2_s 64
googlenet 64 init_weights=False
inception_v3 299 init_weights=False
maxvit_t 224
mnasnet0_5 64
mnasnet1_0 64
mobilenet_v2 64
mobilenet_v3_large 64
mobilenet_v3_small 64
regnet_x_400mf 64
regnet_x_1_6gf 64
regnet_y_400mf 64
regnet_y_1_6gf 64
resnet18 64
resnet34 64
resnet50 64
resnet101 64
resnext50_32x4d 64
shufflenet_v2_x0_5 64
shufflenet_v2_x1_0 64
squeezenet1_0 64
squeezenet1_1 64
swin_t 64
swin_v2_t 64
vgg11 32
vgg11_bn 32
vgg16_bn 32
vit_b_16 64 image_size=64
vit_b_32 64 image_size=64
wide_resnet50_2 64
segmentation/deeplabv3_mobilenet_v3_large 64
segmentation/deeplabv3_resnet50 64
segmentation/fcn_resnet50 64
segmentation/lraspp_mobilenet_v3_large 64
"""

TIMM = """
test_resnet 64
resnet18 64
resnet10t 64
resnet26d 64
resnetaa34d 64
seresnet18 64
ecaresnet26t 64
resnext50_32x4d 64
resnetv2_18 64
resnetv2_50d_gn 64
resnetv2_50x1_bit 64
res2net50_14w_8s 64
res2next50 64
resnest14d 64
skresnet18 64
legacy_seresnet18 64
legacy_seresnext26_32x4d 64
legacy_xception 64
xception41 64
vgg11 64
densenet121 64
densenetblur121d 64
rdnet_tiny 64
dla34 64
dla46x_c 64
dla60_res2net 64
dpn48b 64
dpn68 64
hrnet_w18_small 64
cs3darknet_s 64
cspresnet50 64
cspdarknet53 64
darknet17 64
cspnext_tiny 64
selecsls42 64
ese_vovnet19b_slim 64
eca_vovnet39b 64
tresnet_m 64
inception_v3 96
inception_v4 96
inception_resnet_v2 96
nasnetalarge 64
pnasnet5large 64
regnetx_002 64
regnety_002 64
regnetv_040 64
regnetz_005 64
resnet33ts 64
gcresnext26ts 64
bat_resnext26ts 256
gernet_s 64
repvgg_a0 64
mobileone_s0 64
botnet26t_256 128 img_size=128
eca_botnext26ts_256 128 img_size=128
halonet26t 256
lambda_resnet26t 128
lambda_resnet26rpt_256 128 img_size=128
efficientnet_b0 64
efficientnet_es 64
efficientnet_lite0 64
efficientnet_b0_gn 64
tf_efficientnetv2_b0 64
mixnet_s 64
mnasnet_small 64
mobilenetv1_100 64
mobilenetv2_035 64
mobilenetv3_small_050 64
mobilenetv4_conv_small 64
mobilenetv4_hybrid_medium 64
mobilenet_edgetpu_v2_xs 64
fbnetc_100 64
fbnetv3_b 64
lcnet_035 64
lcnetv2_small 64
tinynet_e 64
hardcorenas_a 64
rexnet_100 64
rexnetr_100 64
ghostnet_050 64
ghostnetv2_100 64
ghostnetv3_050 64
repghostnet_050 64
hgnet_tiny 64
hgnetv2_b0 64
starnet_s050 64
fasternet_t0 64
shvit_s1 64
repvit_m0_9 64
nf_resnet26 64
nf_regnet_b0 64
eca_nfnet_l0 64
dm_nfnet_f0 64
convnext_atto 64
convnextv2_atto 64
convnext_atto_rms 64
inception_next_atto 64
convmixer_768_32 64
mambaout_femto 64
focalnet_tiny_srf 64
edgenext_xx_small 64
mobilevit_xxs 64
mobilevitv2_050 64
fastvit_t8 64
fastvit_sa12 64
efficientformer_l1 224
efficientformerv2_s0 224
efficientvit_b0 64
efficientvit_l1 64
efficientvit_m0 224
swiftformer_xs 224
cpubone_nano 64
lowformer_b0 64
iformer_t 224
csatv2 128
poolformer_s12 64
poolformerv2_s12 64
convformer_s18 64
caformer_s18 64
levit_128s 224
levit_conv_128s 224
coatnet_pico_rw_224 64 img_size=64
coatnet_nano_cc_224 64 img_size=64
maxvit_rmlp_pico_rw_256 64 img_size=64
maxvit_tiny_tf_224 64 img_size=64
test_vit 160
vit_tiny_patch16_224 64 img_size=64
vit_small_patch14_reg4_dinov2 56 img_size=56 depth=3
vit_base_patch16_siglip_224 64 img_size=64 depth=2
vit_small_patch16_rope_224 64 img_size=64 depth=3
vit_tiny_r_s16_p8_224 64 img_size=64
vit_relpos_small_patch16_224 64 img_size=64 depth=3
vit_srelpos_small_patch16_224 64 img_size=64 depth=3
vit_wee_patch16_reg1_gap_256 64 img_size=64
aimv2_large_patch14_224 56 img_size=56 depth=2
samvit_base_patch16_224 64 img_size=64 depth=3
naflexvit_base_patch16_gap 64 depth=2
deit_tiny_patch16_224 64 img_size=64
deit_tiny_distilled_patch16_224 64 img_size=64
deit3_small_patch16_224 64 img_size=64 depth=3
beit_base_patch16_224 64 img_size=64 depth=2
eva02_tiny_patch14_336 56 img_size=56
swin_tiny_patch4_window7_224 64 img_size=64
swinv2_tiny_window8_256 64 img_size=64
swinv2_cr_tiny_224 64 img_size=64
cait_xxs24_224 64 img_size=64 depth=4
xcit_nano_12_p16_224 64 img_size=64
volo_d1_224 64 img_size=64
tnt_s_patch16_224 64 img_size=64 depth=3
pit_ti_224 64 img_size=64
convit_tiny 64 img_size=64
crossvit_9_240 240
coat_lite_tiny 64 img_size=64
twins_pcpvt_small 64 img_size=64
twins_svt_small 64 img_size=64
pvt_v2_b0 64
mvitv2_tiny 64 img_size=64
hiera_tiny_224 64 img_size=64
sam2_hiera_tiny 64
davit_tiny 64
nest_tiny 64 img_size=64
nextvit_small 64
gcvit_xxtiny 64 img_size=64
tiny_vit_5m_224 224
visformer_tiny 64 img_size=64
vitamin_small_224 64 img_size=64
sequencer2d_s 64
efficientvim_m1 64
mixer_s32_224 64 img_size=64
gmixer_12_224 64 img_size=64
resmlp_12_224 64 img_size=64
gmlp_ti16_224 64 img_size=64
"""


def options(words: list[str]) -> dict[str, Any]:
    """ "depth=3 flag=False" -> the arguments they stand for."""
    values: dict[str, Any] = {"True": True, "False": False}
    pairs = (word.split("=") for word in words)
    return {key: values[value] if value in values else int(value) for key, value in pairs}


def lines(table: str) -> dict[str, tuple[int, list[str]]]:
    rows = (line.split() for line in table.strip().splitlines())
    return {name: (int(side), rest) for name, side, *rest in rows}


def torchvision_model(name: str) -> Call:
    side, words = lines(TORCHVISION)[name]
    extra = options(words)
    kind, _, plain = name.rpartition("/")
    if kind:
        extra["weights_backbone"] = None
    model = torchvision.models.get_model(plain, weights=None, **extra)
    return model, (torch.randn(2, 3, side, side),), {}


def timm_model(name: str) -> Call:
    side, words = lines(TIMM)[name]
    model = timm.create_model(name, pretrained=False, **options(words))
    return model, (torch.randn(2, 3, side, side),), {}


def names() -> dict[str, list[str]]:
    """The models of each library."""
    return {
        "torchvision": list(lines(TORCHVISION)),
        "timm": list(lines(TIMM)),
        "transformers": list(MODELS),
        "repositories": list(REPOSITORIES),
    }


def absent(library: str, name: str) -> str:
    """The package that a model needs and that is not installed; else nothing."""
    return REPOSITORIES[name].absent() if library == "repositories" else ""


def build(library: str, name: str) -> Call:
    torch.manual_seed(0)
    builders = {
        "torchvision": torchvision_model,
        "timm": timm_model,
        "transformers": transformers_model,
        "repositories": lambda name: REPOSITORIES[name].make(),
    }
    model, args, kwargs = builders[library](name)
    return model.eval(), args, kwargs
