import json
import warnings

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from ldm import checkpoint
from ldm.data.datamodule import DataModuleFromConfig
from ldm.models.autoregressive import DALLE, ImageGPT
from ldm.models.cogview import CogView
from ldm.models.dvae import DVAE
from ldm.models.net2net import Net2NetTransformer
from ldm.models.vqgan import GumbelVQ, VQNoDiscModel
from ldm.util import UserError, instantiate_from_config
from tests.models.halves import PIXELS, TINY, fit, halves, text_model
from tests.reference import FIXTURES

TREES = json.loads((FIXTURES.parent / "official_configs.json").read_text())
OFFICIAL = [p for p in TREES if p.startswith("taming/") and "transformer" in p]
VQ = {
    "target": "taming.models.vqgan.VQModel",
    "params": {
        "embed_dim": 4,
        "n_embed": 16,
        "ddconfig": {
            "double_z": False, "z_channels": 4, "resolution": 16, "in_channels": 3, "out_ch": 3, "ch": 32,
            "ch_mult": [1, 1], "num_res_blocks": 1, "attn_resolutions": [], "dropout": 0.0,
        },
        "lossconfig": {"target": "taming.modules.losses.DummyLoss"},
    },
}  # fmt: skip
COORD = {"target": "taming.modules.misc.coord.CoordStage", "params": {"n_embed": 16, "down_factor": 2}}


def net2net(**options):
    params = {"vocab_size": 16, "block_size": 128, "n_layer": 2, "n_head": 2, "n_embd": 16}
    return Net2NetTransformer(
        **{
            "transformer_config": {"target": "taming.modules.transformer.mingpt.GPT", "params": params},
            "first_stage_config": VQ,
            "cond_stage_config": COORD,
            "cond_stage_key": "coord",
            **options,
        }
    )  # fmt: skip


def coord_batch(n=2):
    place = (torch.arange(256) / 256).view(1, 16, 16, 1).expand(n, -1, -1, -1)
    return {"image": torch.rand(n, 16, 16, 3) * 2 - 1, "coord": place}


# --- official configs -------------------------------------------------------------------------------------------------


def without_files(node):
    return {k: without_files(v) for k, v in node.items() if k != "ckpt_path"} if isinstance(node, dict) else node


@pytest.mark.parametrize("path", OFFICIAL)
def test_official_transformers_build_with_the_official_keys(path):
    config = without_files(TREES[path]["model"])
    with torch.device("meta"):
        model = instantiate_from_config(config)
    params = config["params"]["transformer_config"]["params"]
    state, n = model.state_dict(), params["n_embd"]
    own = {k.removeprefix("transformer."): tuple(v.shape) for k, v in state.items() if k.startswith("transformer.")}
    assert {k.partition(".")[0] for k in state} == {"transformer", "first_stage_model"}
    assert len(own) == 5 + 17 * params["n_layer"]
    assert own["tok_emb.weight"] == own["head.weight"] == (params["vocab_size"], n)
    assert own["pos_emb"] == (1, params["block_size"], n)
    last = f"blocks.{params['n_layer'] - 1}"
    assert own[f"{last}.attn.mask"] == (1, 1, params["block_size"], params["block_size"])
    assert own[f"{last}.attn.query.weight"] == own[f"{last}.attn.proj.weight"] == (n, n)
    assert own[f"{last}.mlp.2.weight"] == (n, 4 * n)
    assert model.cond_stage_key == config["params"]["cond_stage_key"] and model.grid == (16, 16)


def test_net2net_loads_strictly(tmp_path):
    one = net2net()
    path = tmp_path / "last.ckpt"
    torch.save({"state_dict": one.state_dict()}, path)
    two = net2net(ckpt_path=str(path))
    for k, v in one.state_dict().items():
        assert torch.equal(v, two.state_dict()[k]), k
    state = one.state_dict()
    state["first_stage_model.loss.logvar"] = torch.zeros(())  # a first stage may come with its loss
    checkpoint.load(two, state)
    del state["transformer.head.weight"]
    with pytest.raises(UserError, match="1 missing .*transformer.head.weight"):
        checkpoint.load(two, state)


# --- Net2NetTransformer -----------------------------------------------------------------------------------------------


def test_net2net_loss_is_the_cross_entropy_of_the_image():
    model, batch = net2net().eval(), coord_batch()
    for p in model.transformer.parameters():
        torch.nn.init.normal_(p, std=0.3)
    loss, _ = model.loss(batch)
    z = model.encode_to_z(model.get_input(batch, "image"))
    c = model.encode_to_c(model.get_input(batch, "coord"))
    assert z.shape == c.shape == (2, 64)
    logits, _ = model.transformer(torch.cat([c, z], 1))
    expected = F.cross_entropy(logits[:, 63:-1].flatten(0, 1), z.flatten())
    torch.testing.assert_close(loss, expected)
    assert torch.equal(model.first_stage_model.encode(model.get_input(batch, "image"))[2][2].view(2, -1), z)


def test_net2net_hides_tokens_in_training_only():
    model, batch = net2net(pkeep=0.0), coord_batch()
    seen = []
    original = model.transformer.features
    model.transformer.features = lambda idx, **k: seen.append(idx) or original(idx, **k)
    z = model.encode_to_z(model.get_input(batch, "image"))
    model.train().loss(batch)
    model.eval().loss(batch)
    assert (seen[0][:, 64:] != z[:, :-1]).float().mean() > 0.5 and torch.equal(seen[1][:, 64:], z[:, :-1])
    assert not model.train().first_stage_model.training


def test_net2net_draws():
    model = net2net().eval()
    x = model.sample(seeds=[3, 4, 5], top_k=5)
    assert x.shape == (3, 3, 16, 16) and x.abs().max() <= 1
    torch.testing.assert_close(model.sample(seeds=[4], top_k=5), x[1:2])
    images = model.log_images(coord_batch(3), n=2)
    assert set(images) == {
        "inputs", "reconstructions", "conditioning", "samples_half", "samples_nopix", "samples_det",
    }  # fmt: skip
    assert all(v.shape[0] == 2 and v.min() >= -1 and v.max() <= 1 for v in images.values())


def test_net2net_conditions():
    start = net2net(cond_stage_config="__is_unconditional__", sos_token=3).eval()
    assert start.condition([0, 1])["prefix"].tolist() == [[3], [3]]
    assert start.sample(seeds=[0]).shape == (1, 3, 16, 16)
    assert torch.isfinite(start.loss({"image": coord_batch()["image"]})[0])
    itself = net2net(cond_stage_config="__is_first_stage__", cond_stage_key="image", downsample_cond_size=8).eval()
    c = itself.encode_to_c(itself.get_input(coord_batch(), "image"))
    assert c.shape == (2, 16)
    dummy = {"target": "taming.models.dummy_cond_stage.DummyCondStage", "params": {"conditional_key": "objects_bbox"}}
    boxes = net2net(cond_stage_config=dummy, cond_stage_key="objects_bbox").eval()
    batch = {**coord_batch(), "objects_bbox": torch.randint(16, (2, 5))}
    assert torch.equal(boxes.encode_to_c(boxes.get_input(batch, "objects_bbox")), batch["objects_bbox"])
    assert torch.isfinite(boxes.loss(batch)[0])
    labels = {"target": "taming.modules.util.Labelator", "params": {"n_classes": 10}}
    classes = net2net(cond_stage_config=labels, cond_stage_key="class_label").eval()
    batch = {**coord_batch(), "class_label": torch.tensor([3, 7])}
    assert classes.encode_to_c(classes.get_input(batch, "class_label")).tolist() == [[3], [7]]
    assert torch.isfinite(classes.loss(batch)[0]) and set(classes.log_images(batch, n=2)) >= {"samples_nopix"}
    assert classes.condition([0, 11])["prefix"].tolist() == [[0], [1]]
    assert classes.condition([0], classes=[4])["prefix"].tolist() == [[4]]
    with pytest.raises(UserError, match="got 10 to 10, expected 0 to 9"):
        classes.condition([0], classes=[10])
    with pytest.raises(UserError, match="draws from batch\\['objects_bbox'\\]"):
        boxes.condition([0])
    with pytest.raises(UserError, match="takes no class"):
        start.condition([0], classes=[1])
    continuous = {**VQ, "target": "ldm.models.autoencoder.VQModelInterface"}
    with pytest.raises(UserError, match="expected ldm.models.autoencoder.VQModel, which takes the same params"):
        net2net(first_stage_config=continuous)
    config = {"target": "ldm.modules.gpt.GPT", "params": {"vocab_size": 8, "block_size": 128, "n_head": 2, "n_embd": 8}}
    with pytest.raises(UserError, match="vocab_size: got 8, expected at least 16"):
        net2net(transformer_config=config)


def with_block_size(n):
    params = {"vocab_size": 16, "block_size": n, "n_layer": 1, "n_head": 2, "n_embd": 8}
    return {"target": "taming.modules.transformer.mingpt.GPT", "params": params}


def test_net2net_sequences_over_the_position_table():
    for wrong in (100, 126):  # 64 places and 64 tokens, of which the last is not read
        model = net2net(transformer_config=with_block_size(wrong))
        message = (
            f"got 127 tokens \\(64 .* 64 .*at most {wrong} \\(transformer_config.params.block_size\\): set it to 127"
        )
        with pytest.raises(UserError, match=message):
            model.loss(coord_batch())
        with pytest.raises(UserError, match=message):
            model.eval().sample(seeds=[0])
    model = net2net(transformer_config=with_block_size(127))
    assert model.loss(coord_batch())[0].isfinite() and model.eval().sample(seeds=[0]).shape == (1, 3, 16, 16)


def test_net2net_top_k():
    model = net2net().eval()  # of 16 codes, fewer than the default of 100
    every = model.sample(seeds=[0])
    assert torch.equal(model.sample(seeds=[0], top_k=16), every) and torch.equal(
        model.sample(seeds=[0], top_k=None), every
    )
    for wrong in (17, 100, 0, "many"):
        with pytest.raises(UserError, match=f"top_k: got {wrong}, expected 1 to 16"):
            model.sample(seeds=[0], top_k=wrong)
    many = {**VQ, "params": {**VQ["params"], "n_embed": 300}}
    params = {**with_block_size(128)["params"], "vocab_size": 300}
    model = net2net(first_stage_config=many, transformer_config={"target": "ldm.modules.gpt.GPT", "params": params})
    asked, model.draw_tokens = [], lambda *a, **knobs: asked.append(knobs["top_k"]) or torch.zeros(1, 64).long()
    for given in ({}, {"top_k": 200}, {"top_k": None}):
        model.sample(seeds=[0], **given)
    assert asked == [100, 200, None]


def test_net2net_pictures_of_another_grid():
    model = net2net(transformer_config=with_block_size(512))
    large = {"image": torch.zeros(1, 32, 32, 3), "coord": torch.zeros(1, 32, 32, 1)}
    with pytest.raises(UserError, match="images of 32x32 pixels give 16x16 tokens, but the model was built for 8x8"):
        model.loss(large)


def test_checkpoints_know_their_grid():
    def of(resolution):
        ddconfig = {**VQ["params"]["ddconfig"], "resolution": resolution}
        stage = {**VQ, "params": {**VQ["params"], "ddconfig": ddconfig}}
        rotary = {"params": {"n_layer": 1, "n_head": 2, "n_embd": 16, "positions": "rotary"}}
        return ImageGPT(stage, rotary)

    one, other, content = of(16), of(32), {}
    one.on_save_checkpoint(content)
    checkpoint.load(other, one.state_dict())  # no weight depends on the grid
    one.on_load_checkpoint(content)
    with pytest.raises(UserError, match="got a first stage of 16x16 tokens a picture, expected 8x8"):
        other.on_load_checkpoint(content)
    del content["token_grid"]
    other.on_load_checkpoint(content)  # official files, and older ones, do not say


def test_weight_decay_is_for_matrices_alone():
    model = net2net()
    model.learning_rate = 1e-3
    decayed, spared = model.configure_optimizers().param_groups
    names = {id(p): k for k, p in model.named_parameters()}
    assert decayed["weight_decay"] == 0.01 and decayed["betas"] == (0.9, 0.95) and spared["weight_decay"] == 0
    assert all(names[id(p)].endswith("weight") and p.ndim == 2 for p in decayed["params"])
    kept = {names[id(p)] for p in spared["params"]}
    assert {"transformer.tok_emb.weight", "transformer.pos_emb", "transformer.blocks.0.ln1.weight"} <= kept
    together = {names[id(p)] for p in decayed["params"]} | kept
    assert together == {f"transformer.{k}" for k, _ in model.transformer.named_parameters()}


def test_muon_has_the_matrices_of_the_blocks():
    model = ImageGPT(PIXELS, TINY, optimizer_config={"target": "timm.optim.Muon", "params": {"weight_decay": 0.1}})
    matrices, rest = model.configure_optimizers().param_groups
    names = {id(p): k for k, p in model.named_parameters()}
    assert {names[id(p)].split(".")[1] for p in matrices["params"]} == {"blocks"} and matrices["weight_decay"] == 0.1
    assert all(p.ndim == 2 for p in matrices["params"]) and len(matrices["params"]) == 6 * 2
    assert rest["use_fallback"] and rest["weight_decay"] == 0
    assert {"transformer.tok_emb.weight", "transformer.head.weight"} <= {names[id(p)] for p in rest["params"]}


# --- ImageGPT ---------------------------------------------------------------------------------------------------------


def test_image_gpt_learns_its_classes():
    torch.manual_seed(0)
    model = fit(ImageGPT(PIXELS, TINY, num_classes=4, cond_dropout=0.1), 300)
    pictures = halves()["image"].permute(0, 3, 1, 2)
    assert model.loss(halves())[0].item() < 0.02
    drawn = model.sample(model.condition(range(4), classes=[0, 1, 2, 3]), seeds=range(4), temperature=0.0, scale=1.5)
    torch.testing.assert_close(drawn, pictures)
    assert model.condition([5, 6])["prefix"].tolist() == [[4 + 1], [4 + 2]]
    assert model.condition([5])["uncond"].tolist() == [[4 + 4]]


def test_image_gpt_without_classes_and_its_faults():
    model = ImageGPT(PIXELS, TINY).eval()
    assert model.sample(seeds=[0, 1]).shape == (2, 1, 4, 4)
    with pytest.raises(UserError, match="takes no class"):
        model.condition([0], classes=[0])
    with pytest.raises(UserError, match="top_k: got 5, expected 1 to 4"):
        model.sample(seeds=[0], top_k=5)
    with pytest.raises(UserError, match="without cond_dropout"):
        model.sample(seeds=[0], scale=2.0)
    with pytest.raises(UserError, match="images of 8x8 pixels give 8x8 tokens, .* built for 4x4"):
        model.loss({"image": torch.zeros(1, 8, 8, 1)})
    with pytest.raises(UserError, match="params.vocab_size: got 9, expected 5"):
        ImageGPT(PIXELS, {"params": {**TINY["params"], "vocab_size": 9}})
    with pytest.raises(UserError, match="Identity makes no tokens"):
        ImageGPT({"target": "torch.nn.Identity"}, TINY)


def test_priming_keeps_the_upper_part():
    model = ImageGPT(PIXELS, TINY).eval()
    x = halves()["image"].permute(0, 3, 1, 2)
    drawn = model.sample(model.prime(model.condition(range(4)), x, keep=0.5), seeds=range(4))
    torch.testing.assert_close(drawn[:, :, :2], x[:, :, :2])
    one = model.sample(model.prime(model.condition(range(3)), x[:1], keep=0.25), seeds=range(3))
    torch.testing.assert_close(one[:, :, :1], x[:1, :, :1].expand(3, -1, -1, -1))
    for wrong, keep in ((x, 1.0), (x[:2], 0.5)):
        with pytest.raises(UserError, match="keep|2 pictures to complete for 3 seeds"):
            model.prime(model.condition(range(3)), wrong, keep)


def test_tokens_are_kept_on_request():
    model = ImageGPT(PIXELS, TINY, cache_codes=True)
    calls, encode = [], model.first_stage_model.encode
    model.first_stage_model.encode = lambda x: calls.append(len(x)) or encode(x)
    first = model.image_tokens(halves())
    assert torch.equal(model.image_tokens(halves()), first) and calls == [4]
    assert torch.equal(model.image_tokens({"image": halves()["image"][2:3]}), first[2:3]) and calls == [4]
    dark = {"image": -torch.ones(1, 4, 4, 1)}
    assert int(model.image_tokens(dark).max()) == 0 and calls == [4, 1]
    assert model.image_tokens(halves(), shrink=2).shape == (4, 4) and calls == [4, 1, 4]


def test_average_of_the_weights():
    model = ImageGPT(PIXELS, TINY, use_ema=True)
    assert any(k.startswith("model_ema.") for k in model.state_dict())
    assert set(model.log_images(halves(), n=2)) == {"inputs", "reconstructions", "samples", "samples_half"}


# --- DALLE, and what CogView shares with it ---------------------------------------------------------------------------


def test_dalle_draws_what_it_was_told():
    model = fit(fit(text_model(DALLE), 300), 100, lr=3e-4)  # at one rate the end depends on the number of threads
    cond = model.condition(range(4), prompts=halves()["caption"])
    drawn = model.sample(cond, seeds=range(4), temperature=0.0)
    torch.testing.assert_close(drawn, halves()["image"].permute(0, 3, 1, 2))
    again = text_model(DALLE)
    again.text = type(model.text)(270)
    checkpoint.load(again, model.state_dict())  # the vocabulary is in the checkpoint
    cond = again.eval().condition([0], prompts=["Bright  TOP"])
    torch.testing.assert_close(again.sample(cond, seeds=[0], temperature=0.0), drawn[2:3])


def test_dalle_loss_is_the_weighted_sum_of_both_parts():
    model = text_model(DALLE, cond_dropout=0.0, text_weight=1.0, image_weight=7.0).eval()
    for p in model.transformer.parameters():
        torch.nn.init.normal_(p, std=0.2)
    loss, logs = model.loss(halves())
    rows, z = model.text_rows(halves()["caption"]), model.image_tokens(halves())
    tokens = torch.cat([torch.full((4, 1), 276), rows, z + 277], 1)
    logits, _ = model.transformer(tokens[:, :-1])
    text = F.cross_entropy(logits[:, :6, :276].flatten(0, 1), rows.flatten())
    image = F.cross_entropy(logits[:, 6:, 277:].flatten(0, 1), z.flatten())
    torch.testing.assert_close(logs["loss_text"], text)
    torch.testing.assert_close(logs["loss_image"], image)
    torch.testing.assert_close(loss, (text + 7 * image) / 8)
    assert (rows >= 270).any() and int(rows.max()) == 275  # each place has its own padding


@pytest.mark.parametrize("cls", [DALLE, CogView])
def test_prompts_and_their_faults(cls):
    model = text_model(cls).eval()
    seeds = [4, 5, 6]
    one = model.condition(seeds, prompts=["bright top"])
    x = model.sample(one, seeds=seeds, top_k=3, top_p=0.9)
    alone = model.condition([5], prompts=["bright top"])
    assert torch.equal(model.sample(alone, seeds=[5], top_k=3, top_p=0.9), x[1:2])
    assert model.sample(seeds=[1]).shape == (1, 1, 4, 4)
    with pytest.raises(UserError, match="takes no class"):
        model.condition(seeds, classes=[1])
    with pytest.raises(UserError, match="2 prompts for 3 pictures"):
        model.condition(seeds, prompts=["a", "b"])
    with pytest.warns(UserWarning, match="text window 6 .*cut off is"):
        model.condition([0], prompts=["bright top bright left right bottom bright bright"])
    with pytest.warns(UserWarning, match="holds '山', which no training caption holds"):
        model.condition([0], prompts=["top 山"])
    negative = model.condition([0], prompts=["bright top"], negative_prompt="bright left")
    assert torch.equal(negative["uncond"], model.condition([0], prompts=["bright left"])["prefix"])
    strict = text_model(cls, cond_dropout=0.0).eval()
    for options in ({}, {"prompts": [" "]}, {"prompts": ["top"], "negative_prompt": "left"}):
        with pytest.raises(UserError, match="without cond_dropout"):
            strict.condition([0], **options)
    with pytest.raises(UserError, match="without cond_dropout"):
        strict.sample(strict.condition([0], prompts=["top"]), seeds=[0], scale=3.0)


@pytest.mark.parametrize("cls", [DALLE, CogView])
def test_empty_prompts_are_told(cls):
    model = text_model(cls).eval()
    for prompts in ([""], ["top", " "]):
        with pytest.warns(UserWarning, match="empty prompt: the picture is drawn without a condition") as said:
            cond = model.condition([0, 1], prompts=prompts)
        assert len(said) == 1 and torch.equal(cond["prefix"][1], cond["uncond"][1])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.condition([0, 1])  # nobody gave one
        model.condition([0, 1], prompts=["bright top"], negative_prompt="")


def listed_halves(folder, captions):
    """The config of a data set of the four pictures with these captions."""
    lines = []
    for i, (x, text) in enumerate(zip(halves()["image"], captions, strict=True)):
        Image.fromarray(((x[..., 0] + 1) * 127.5).byte().numpy()).save(folder / f"{i}.png")
        lines.append(f"{i}.png\t{text}")
    (folder / "list.txt").write_text("\n".join(lines))
    params = {"paths": str(folder / "list.txt"), "data_root": str(folder), "size": 4, "channels": 1}
    return {"target": "ldm.data.filelist.FileList", "params": params}


@pytest.mark.parametrize("cls", [DALLE, CogView])
@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_empty_captions_of_a_model_without_dropout_are_told(cls, dropout, tmp_path):
    data = listed_halves(tmp_path, ["bright left", "", "bright top", ""])
    model = text_model(cls, cond_dropout=dropout)
    model.learning_rate = 1e-3
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=1, default_root_dir=tmp_path, enable_model_summary=False, **options)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        trainer.fit(model, DataModuleFromConfig(2, data, data, num_workers=0))
    told = [str(w.message) for w in said if "empty caption" in str(w.message)]
    assert len(told) == (dropout == 0)
    if told:
        assert (
            f"2 of 4 training pictures have an empty caption, e.g. {tmp_path / '1.png'}: without cond_dropout"
            in told[0]
        )


def test_training_learns_the_vocabulary_first(tmp_path):
    data = listed_halves(tmp_path, halves()["caption"])
    model = DALLE(PIXELS, TINY, text_vocab=265, text_length=12, cache_codes=True)
    model.learning_rate = 1e-3
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(max_steps=3, default_root_dir=tmp_path, enable_model_summary=False, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, DataModuleFromConfig(2, data, data, num_workers=0))
    assert model.text.learned and model.text.decode(model.text.encode("bright left")) == "bright left"
    assert int((model.text.merges[:, 0] >= 0).sum()) == 9 and len(model._codes) == 4
    assert {"train/loss", "train/loss_text", "val/loss_image"} <= set(trainer.callback_metrics)
    bare = DALLE(PIXELS, TINY, text_vocab=265, text_length=12)
    bare.learning_rate = 1e-3
    loader = torch.utils.data.DataLoader([{"image": halves()["image"][0], "caption": "x"}])
    with pytest.raises(UserError, match="DALLE has no text tokens: give tokenizer_file"):
        pl.Trainer(max_steps=1, default_root_dir=tmp_path, enable_model_summary=False, **options).fit(bare, loader)


# --- GumbelVQ and VQNoDiscModel ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "option", [{"remap": "used.npy"}, {"quantizer_config": {"target": "ldm.modules.quantize.FSQ"}}]
)
def test_gumbel_codes_are_all_there_are(option):
    (name,) = option
    for cls in (GumbelVQ, DVAE):
        params = {k: v for k, v in VQ["params"].items() if k != "lossconfig" or cls is GumbelVQ}
        with pytest.raises(
            UserError, match=f"{name}: got .*used.npy|{name}: got .*FSQ.*, expected none: {cls.__name__}"
        ):
            cls(**params, **option)
        assert cls(**params, **dict.fromkeys(option)).n_embed == 16


def test_vq_model_without_a_discriminator(tmp_path):
    loss = {
        "target": "taming.modules.losses.vqperceptual.VQLPIPSWithDiscriminator",
        "params": {"disc_start": 0, "perceptual_weight": 0.0, "disc_ndf": 8, "disc_num_layers": 1},
    }
    model = VQNoDiscModel(**{**VQ["params"], "lossconfig": loss})
    model.learning_rate = 1e-3
    before = {k: v.clone() for k, v in model.loss.discriminator.state_dict().items() if "weight" in k}
    loader = torch.utils.data.DataLoader([{"image": x} for x in coord_batch(4)["image"]], batch_size=2)
    options = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_steps=2, default_root_dir=tmp_path, enable_model_summary=False, gradient_clip_val=1.0,
        accumulate_grad_batches=1, **options,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model, loader, loader)
    assert model.updates == 2 and {"train/rec_loss", "val/codebook_usage"} <= set(trainer.callback_metrics)
    assert float(trainer.callback_metrics["train/disc_factor"]) == 0
    for k, v in before.items():
        assert torch.equal(v, model.loss.discriminator.state_dict()[k])
