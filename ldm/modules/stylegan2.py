"""StyleGAN2: mapping network, synthesis network, generator (the discriminator is in stylegan2_discriminator).

Karras et al. 2019 ("A style-based generator architecture for GANs"), 2020 ("Analyzing and improving the image quality
of StyleGAN"; the three architectures are its figure 7) and 2020 ("Training GANs with limited data"; mixed precision is
appendix D.1). Constructor parameters and state-dict names are those of official checkpoints.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ldm.modules.stylegan2_discriminator import Discriminator as Discriminator
from ldm.modules.stylegan2_layers import (
    FILTER,
    Conv2dLayer,
    FullyConnectedLayer,
    Randn,
    SynthesisLayer,
    ToRGBLayer,
)
from ldm.modules.stylegan2_mapping import MappingNetwork as MappingNetwork
from ldm.modules.stylegan2_mapping import mix_styles as mix_styles
from ldm.modules.stylegan2_mapping import style_mixing as style_mixing
from ldm.modules.stylegan2_ops import setup_filter, upsample2d
from ldm.modules.stylegan2_precision import block_dtype, block_resolutions, channels_at, low_precision_from
