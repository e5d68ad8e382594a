"""Files of random weights in the formats of the networks that torch-fidelity knows, at the places where they belong."""

import hashlib
from pathlib import Path

import torch
from torch import nn
from torch_fidelity.feature_extractor_clip import MODEL_METADATA
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

from ldm.evaluation import features
from ldm.modules.open_clip_text import CLIP

VISION = {"image_size": 16, "patch_size": 8, "width": 64, "layers": 1}
TEXT = {"embed_dim": 16, "width": 64, "heads": 1, "layers": 1}
# what is published is built by its own repository; here is a small network that is loaded in the same way
HUBCONF = """
import torch
from torch import nn

dependencies = ["torch"]


def dinov2_vits14(pretrained=True):
    model = nn.Sequential(nn.Conv2d(3, 8, 14, stride=14), nn.GELU(), nn.AdaptiveAvgPool2d(2), nn.Flatten())
    if pretrained:
        url = "https://dl.fbaipublicfiles.com/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth"
        model.load_state_dict(torch.hub.load_state_dict_from_url(url, map_location="cpu"), strict=True)
    return model
"""


class Fresh(FeatureExtractorInceptionV3):
    """The network as it is built, whatever the file holds."""

    def load_state_dict(self, *_, **__):
        pass


def inception(folder):
    """{key: tensor} of the network of the FID of papers."""
    torch.save({}, folder / "nothing.pth")
    torch.manual_seed(0)
    network = Fresh("inception-v3-compat", ["2048"], feature_extractor_weights_path=str(folder / "nothing.pth"))
    for module in network.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    return network.state_dict()


def clip():
    """{key: tensor} of a small CLIP, in half precision as OpenAI's."""
    torch.manual_seed(1)
    state = {k: v.half() for k, v in CLIP(VISION, TEXT).state_dict().items()}
    sizes = {"input_resolution": 16, "context_length": 77, "vocab_size": 49408}
    return {**state, **{k: torch.tensor(v) for k, v in sizes.items()}}


def archive(state, file):
    """A TorchScript file whose state_dict is this one."""
    root = nn.Module()
    for key, value in state.items():
        module, *rest = root, *key.split(".")
        for name in rest[:-1]:
            if not hasattr(module, name):
                module.add_module(name, nn.Module())
            module = getattr(module, name)
        module.register_buffer(rest[-1], value)
    torch.jit.script(root).save(str(file))


def dinov2(hub):
    """The repository, unpacked, and {key: tensor}."""
    repository = hub / "facebookresearch_dinov2_main"
    repository.mkdir(exist_ok=True)
    (repository / "hubconf.py").write_text(HUBCONF)
    torch.manual_seed(2)
    return nn.Conv2d(3, 8, 14, stride=14).state_dict(prefix="0.")


def place(name, hub, state, patch):
    """Writes the state to the file that the network of this name is read from, as if it were the published one."""
    checkpoints = Path(hub) / "checkpoints"
    checkpoints.mkdir(parents=True, exist_ok=True)
    file = checkpoints / "new"
    if name.startswith("clip"):
        archive(state, file)
    else:
        torch.save(state, file)
    sha = hashlib.sha256(file.read_bytes()).hexdigest()
    if name.startswith("clip"):
        patch.setitem(MODEL_METADATA[name], "hash", sha)
        return file.rename(checkpoints / f"{name}-{sha}.pt")
    if name.startswith("dinov2"):
        return file.rename(checkpoints / "dinov2_vits14_pretrain.pth")
    patch.setattr(features, "INCEPTION_SHA", sha[:8])
    return file.rename(checkpoints / features.INCEPTION_FILE)
