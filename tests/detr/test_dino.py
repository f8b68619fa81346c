"""DINO: its losses, its denoising, its gradients, and the weights of other programs."""

import math

import pytest
import torch
from detbackbones import TimmBackbone, TransformersDetector
from detbackbones.detr import dino
from detbackbones.training.checkpoint import load_init_checkpoint
from detectron2.structures import Boxes, Instances
from support import images
from torch import nn
from transformers import DeformableDetrConfig, DeformableDetrForObjectDetection, ResNetConfig

SMALL = {"encoder_layers": 1, "decoder_layers": 2, "d_model": 32, "num_denoising": 4}
SMALL |= {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48}


def detector(seed=0, num_classes=3, num_queries=20, **config_kwargs):
    torch.manual_seed(seed)
    return TransformersDetector(
        architecture="dino",
        backbone=TimmBackbone("test_resnet", norm="FrozenBN"),
        num_classes=num_classes,
        num_queries=num_queries,
        config_kwargs=SMALL | config_kwargs,
    )


def labels(*counts):
    """For each image some boxes, as cx, cy, w, h."""
    box = torch.tensor([[0.5, 0.4, 0.2, 0.3], [0.3, 0.6, 0.4, 0.2]])
    return [{"class_labels": torch.tensor([1, 2])[:n], "boxes": box[:n]} for n in counts]


def mask(images):
    return torch.ones(len(images), *images.shape[-2:], dtype=torch.long)


def test_every_loss_by_hand():
    """Focal loss with alpha 0.25 and gamma 2, L1 times 5 and GIoU times 2, over one box."""
    model = detector(num_classes=1).detr
    truth = [{"class_labels": torch.tensor([0]), "boxes": torch.tensor([[0.5, 0.5, 0.4, 0.4]])}]
    # Of two queries with probabilities 0.8 and 0.1 the second has the better box.
    logits = torch.tensor([[[math.log(4)], [-math.log(9)]]])
    boxes = torch.tensor([[[0.1, 0.1, 0.1, 0.1], [0.6, 0.5, 0.4, 0.4]]])
    predicted = {"logits": logits, "pred_boxes": boxes}
    unmatched = 0.75 * 0.8**2 * -math.log(0.2)
    matched = 0.25 * 0.9**2 * -math.log(0.1)
    union = 2 * 0.16 - 0.3 * 0.4  # the boxes share 0.3 x 0.4, and 0.5 x 0.4 holds both
    giou = 0.12 / union - (0.2 - union) / 0.2
    expected = {"loss_ce": unmatched + matched, "loss_bbox": 5 * 0.1, "loss_giou": 2 * (1 - giou)}
    losses = model._losses(predicted, [predicted, predicted], truth, num_boxes=1)
    names = {f"{key}{end}": value for key, value in expected.items() for end in ("_enc", "_0", "")}
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(names, abs=1e-5)

    # Denoising, two groups: of each the first query is the positive one whatever its box, the
    # second the negative one. The sums over both groups are divided by two.
    noise = {"dn_num_split": [4, 5], "dn_num_group": 2, "dn_positive_idx": (torch.tensor([0, 2]),)}
    ce = 0.25 * 0.2**2 * -math.log(0.8) + 0.75 * 0.1**2 * -math.log(0.9)
    boxes = torch.tensor([[0.5, 0.5, 0.4, 0.4], [0.9, 0.9, 0.1, 0.1]])
    layer = {"logits": logits.repeat(1, 3, 1), "pred_boxes": boxes.repeat(3, 1)[None]}
    losses = model._denoising_losses([layer, layer], truth, noise, num_boxes=1)
    expected = {"loss_ce": ce, "loss_bbox": 0, "loss_giou": 0}
    names = {f"{name}_dn{end}": value for name, value in expected.items() for end in ("_0", "")}
    assert {key: value.item() for key, value in losses.items()} == pytest.approx(names, abs=1e-5)


def test_every_layer_has_its_losses():
    model = detector().detr.train()
    pixels = images(2, 3, 64, 96)
    losses = model(pixels, mask(pixels), labels(2, 1)).loss_dict
    ends = ("_enc", "_0", "", "_dn_0", "_dn")
    kinds = ("loss_ce", "loss_bbox", "loss_giou")
    assert sorted(losses) == sorted(f"{kind}{end}" for kind in kinds for end in ends)


def test_positive_queries_are_nearer_to_their_boxes_than_negative_ones():
    model = detector(num_denoising=400).detr
    torch.manual_seed(0)
    truth = [{"class_labels": torch.tensor([1]), "boxes": torch.tensor([[0.5, 0.5, 0.2, 0.2]])}]
    _, boxes, _, noise = model._denoise(truth)
    assert noise["dn_num_group"] == 400 and boxes.shape == (1, 800, 4)
    x, y, w, h = boxes[0].sigmoid().T
    left = (x - w / 2 - 0.4).abs() / 0.1  # in halves of the width
    (positive,) = noise["dn_positive_idx"]
    kept = w > 1e-3  # of the others the noise has put the left side beyond the right one
    is_positive = torch.zeros(800, dtype=bool).index_fill(0, positive, True)
    assert left[is_positive].max() <= 1.001 and 0.4 < left[is_positive].mean() < 0.6
    negative = left[~is_positive & kept]
    assert len(negative) > 200 and 0.999 <= negative.min() and negative.max() <= 2.001


def test_padding_among_the_denoising_queries_is_the_same_whatever_is_there():
    """The second image has one box of two: its other queries have logits of zero."""
    model = detector().detr
    queries, boxes, _, noise = model._denoise(labels(2, 1))
    groups = noise["dn_num_group"]
    padded = queries[1].eq(0).all(1)
    assert padded.tolist() == [False, True, False, True] * groups
    assert (boxes[1, padded] == 0).all() and boxes[0].abs().max() < 6.91
    assert not queries[0].eq(0).all(1).any()


def test_predictions_that_are_not_finite_give_a_loss_that_is_not():
    """So that the training ends in its own sentence, and not in transformers' matcher."""
    model = detector().detr.train()
    pixels = torch.full((1, 3, 64, 96), float("nan"))
    assert model(pixels, mask(pixels), labels(1)).loss.isnan()


def test_matched_queries_do_not_see_the_noised_boxes():
    """Nor does one group of denoising queries see another; all of them may see matched ones."""
    model = detector().detr.train()
    pixels = images(1, 3, 64, 96)
    memory = model._encode(pixels, mask(pixels))
    noised, boxes, hidden, noise = model._denoise(labels(2))
    count, groups = noise["dn_num_split"][0], noise["dn_num_group"]
    assert count == 8 and groups == 2
    queries = torch.cat([noised, model.query_content.weight[None]], 1).detach().requires_grad_()
    boxes = torch.cat([boxes.sigmoid(), torch.rand(1, 20, 4)], 1)
    logits = model._decode(memory, queries, boxes, hidden)[-1]["logits"]

    def seen(part):
        (gradient,) = torch.autograd.grad(logits[:, part].sum(), queries, retain_graph=True)
        return gradient[0].abs().sum(1) > 0

    assert seen(slice(count, None)).tolist() == [False] * 8 + [True] * 20
    assert seen(slice(0, 4)).tolist() == [True] * 4 + [False] * 4 + [True] * 20
    assert seen(slice(4, 8)).tolist() == [False] * 4 + [True] * 24


def test_it_looks_forward_twice():
    """A layer's boxes train the head of the layer before, and none of those before that."""
    model = detector(decoder_layers=3).detr
    for head in model.bbox_embed:
        nn.init.normal_(head.layers[-1].weight)
    pixels = images(1, 3, 64, 96)
    memory = model._encode(pixels, mask(pixels))
    queries, boxes = model.query_content.weight[None], torch.rand(1, 20, 4)
    layers = model._decode(memory, queries, boxes, None)
    first = [head.layers[0].weight for head in model.bbox_embed]
    gradients = torch.autograd.grad(
        layers[2]["pred_boxes"].sum(), first, allow_unused=True, retain_graph=True
    )
    assert [gradient is not None for gradient in gradients] == [False, True, True, False]


def test_it_is_transformers_two_stage_deformable_detr_but_for_the_queries(monkeypatch):
    """The networks part in three places, which are put in the other's way here.

    DINO learns its queries and gives them a new position in each layer, where Deformable DETR
    computes both once from the proposals; it has a norm after each layer; and it keeps boxes
    further away from 0 and 1. Deformable DETR chooses by the first class, and encodes positions as
    detrex does.
    """
    torch.manual_seed(0)
    shapes = TimmBackbone("test_resnet", out_features=["res3", "res4", "res5"]).output_shape()
    stand_in = ResNetConfig(
        embedding_size=1,
        hidden_sizes=[shape.channels for shape in shapes.values()],
        depths=[1, 1, 1],
        out_indices=[1, 2, 3],
    )
    small = {key: value for key, value in SMALL.items() if key != "num_denoising"}
    config = DeformableDetrConfig(
        backbone_config=stand_in,
        num_labels=1,
        two_stage=True,
        with_box_refine=True,
        two_stage_num_proposals=20,
        dropout=0.0,
        **small,
    )
    theirs = DeformableDetrForObjectDetection(config).eval()
    for parameter in theirs.parameters():
        nn.init.normal_(parameter, std=0.1)
    ours = detector(num_classes=1, **POSITIONS["detrex"]).detr.eval()
    theirs.model.backbone = ours.backbone
    state = {key.removeprefix("model."): v for key, v in theirs.state_dict().items()}
    assert set(ours.state_dict()) - set(state) == {
        "query_content.weight",
        "label_embed.weight",
        "ref_point_head.layers.0.weight",
        "ref_point_head.layers.0.bias",
        "ref_point_head.layers.1.weight",
        "ref_point_head.layers.1.bias",
        "decoder_norm.weight",
        "decoder_norm.bias",
    }
    ours.load_state_dict(state, strict=False)
    pixels = images(1, 3, 96, 128)
    seen = mask(pixels)  # of padding all positions are alike, and which are chosen is any
    with torch.no_grad():
        expected = theirs(pixels, seen)
        proposals = ours._propose(ours._encode(pixels, seen))
        torch.testing.assert_close(proposals["pred_boxes"], expected.init_reference_points)

        logits = proposals["pred_boxes"].logit()
        positions = theirs.model.get_proposal_pos_embed(logits)
        positions = theirs.model.pos_trans_norm(theirs.model.pos_trans(positions))
        position, content = positions.chunk(2, -1)
        ours.query_content.weight.copy_(content[0])
        ours.ref_point_head = Always(position)
        ours.decoder_norm = nn.Identity()
        monkeypatch.setattr(dino, "_EPS", 1e-5)
        got = ours(pixels, seen)
    assert expected.pred_boxes.std() > 0.05
    torch.testing.assert_close(got.logits, expected.logits, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(got.pred_boxes, expected.pred_boxes, rtol=1e-4, atol=1e-4)


class Always(nn.Module):
    def __init__(self, value):
        super().__init__()
        self.value = value

    def forward(self, *_):
        return self.value


def test_without_denoising_every_parameter_that_is_trained_has_a_gradient():
    model = detector(num_denoising=0)
    image = {"image": torch.zeros(3, 64, 96), "instances": Instances((64, 96))}
    image["instances"].gt_boxes = Boxes([[10, 10, 40, 50]])
    image["instances"].gt_classes = torch.tensor([1])
    losses = model([image])
    assert not [key for key in losses if "dn" in key]
    sum(losses.values()).backward()
    assert [k for k, p in model.named_parameters() if p.requires_grad and p.grad is None] == []


def test_five_scales():
    """Those of strides 4 to 32 of the backbone, and one that is computed from the last."""
    torch.manual_seed(0)
    model = TransformersDetector(
        architecture="dino",
        backbone=TimmBackbone("test_resnet"),
        num_classes=3,
        in_features=["res2", "res3", "res4", "res5"],
        config_kwargs=SMALL,
        num_queries=20,
    )
    pixels = images(1, 3, 128, 192)
    shapes = model.detr._encode(pixels, mask(pixels)).levels["spatial_shapes_list"]
    assert shapes == [(32, 48), (16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(
    ("key", "value", "sentence"),
    [
        ("two_stage", False, "two_stage=False must be True"),
        ("num_denoising", -1, "num_denoising=-1 must be at least 0"),
        ("label_noise_ratio", 3, "label_noise_ratio=3 must be from 0 to 2"),
        ("box_noise_scale", 0, "box_noise_scale=0 must be more than 0"),
        ("num_feature_levels", 2, "num_feature_levels=2 must be at least 3"),
        ("position_embedding_type", "learned", "position_embedding_type='learned' must be 'sine'"),
        ("encoder_layers", 0, "encoder_layers=0 must be more than 0"),
        ("position_temperature", 0, "position_temperature=0 must be more than 0"),
        ("two_stage_num_proposals", 9, "two_stage_num_proposals must be left out in DINO"),
        ("d_model", 48, "config_kwargs: transformers cannot build 'dino' with them: num_channels"),
    ],
)
def test_what_is_not_dino_is_refused(key, value, sentence):
    with pytest.raises(ValueError, match=sentence):
        detector(**{key: value})


# Names of ours to those of detrex, of the authors' program and of mmdetection 3, in a model of one
# layer in the encoder and two in the decoder. {w} is weight and bias.
ATTENTION = ["sampling_offsets", "attention_weights", "value_proj", "output_proj"]
ENCODER = {
    **{
        f"encoder.layers.0.self_attn.{part}": (
            f"transformer.encoder.layers.0.attentions.0.{part}",
            f"transformer.encoder.layers.0.self_attn.{part}",
            f"encoder.layers.0.self_attn.{part}",
        )
        for part in ATTENTION
    },
    "encoder.layers.0.self_attn_layer_norm": (
        "transformer.encoder.layers.0.norms.0",
        "transformer.encoder.layers.0.norm1",
        "encoder.layers.0.norms.0",
    ),
    "encoder.layers.0.mlp.fc1": (
        "transformer.encoder.layers.0.ffns.0.layers.0.0",
        "transformer.encoder.layers.0.linear1",
        "encoder.layers.0.ffn.layers.0.0",
    ),
    "encoder.layers.0.mlp.fc2": (
        "transformer.encoder.layers.0.ffns.0.layers.1",
        "transformer.encoder.layers.0.linear2",
        "encoder.layers.0.ffn.layers.1",
    ),
    "encoder.layers.0.final_layer_norm": (
        "transformer.encoder.layers.0.norms.1",
        "transformer.encoder.layers.0.norm2",
        "encoder.layers.0.norms.1",
    ),
    "enc_output": ("transformer.enc_output", "transformer.enc_output", "memory_trans_fc"),
    "enc_output_norm": (
        "transformer.enc_output_norm",
        "transformer.enc_output_norm",
        "memory_trans_norm",
    ),
}


def decoder_layer(i):
    ours, detrex = f"decoder.layers.{i}", f"transformer.decoder.layers.{i}"
    return {
        **{
            f"{ours}.encoder_attn.{part}": (
                f"{detrex}.attentions.1.{part}",
                f"{detrex}.cross_attn.{part}",
                f"{ours}.cross_attn.{part}",
            )
            for part in ATTENTION
        },
        f"{ours}.self_attn.o_proj": (
            f"{detrex}.attentions.0.attn.out_proj",
            f"{detrex}.self_attn.out_proj",
            f"{ours}.self_attn.attn.out_proj",
        ),
        f"{ours}.self_attn_layer_norm": (
            f"{detrex}.norms.0",
            f"{detrex}.norm2",
            f"{ours}.norms.0",
        ),
        f"{ours}.encoder_attn_layer_norm": (
            f"{detrex}.norms.1",
            f"{detrex}.norm1",
            f"{ours}.norms.1",
        ),
        f"{ours}.mlp.fc1": (
            f"{detrex}.ffns.0.layers.0.0",
            f"{detrex}.linear1",
            f"{ours}.ffn.layers.0.0",
        ),
        f"{ours}.mlp.fc2": (
            f"{detrex}.ffns.0.layers.1",
            f"{detrex}.linear2",
            f"{ours}.ffn.layers.1",
        ),
        f"{ours}.final_layer_norm": (f"{detrex}.norms.2", f"{detrex}.norm3", f"{ours}.norms.2"),
    }


DECODER = {
    **decoder_layer(0),
    **decoder_layer(1),
    "decoder_norm": ("transformer.decoder.norm", "transformer.decoder.norm", "decoder.norm"),
    **{
        f"ref_point_head.layers.{i}": (
            f"transformer.decoder.ref_point_head.layers.{i}",
            f"transformer.decoder.ref_point_head.layers.{i}",
            f"decoder.ref_point_head.layers.{i}",
        )
        for i in (0, 1)
    },
}
HEADS = {
    **{
        f"class_embed.{i}": (
            f"class_embed.{i}",
            "transformer.enc_out_class_embed" if i == 2 else f"class_embed.{i}",
            f"bbox_head.cls_branches.{i}",
        )
        for i in range(3)
    },
    **{
        f"bbox_embed.{i}.layers.{j}": (
            f"bbox_embed.{i}.layers.{j}",
            f"{'transformer.enc_out_bbox_embed' if i == 2 else f'bbox_embed.{i}'}.layers.{j}",
            f"bbox_head.reg_branches.{i}.{2 * j}",
        )
        for i in range(3)
        for j in range(3)
    },
}
PROJECTIONS = {
    **{
        f"input_proj.{i}.0": (f"neck.convs.{i}.conv", f"input_proj.{i}.0", f"neck.convs.{i}.conv")
        for i in range(3)
    },
    **{
        f"input_proj.{i}.1": (f"neck.convs.{i}.norm", f"input_proj.{i}.1", f"neck.convs.{i}.gn")
        for i in range(3)
    },
    "input_proj.3.0": ("neck.extra_convs.0.conv", "input_proj.3.0", "neck.extra_convs.0.conv"),
    "input_proj.3.1": ("neck.extra_convs.0.norm", "input_proj.3.1", "neck.extra_convs.0.gn"),
}
SINGLE = {
    "level_embed": ("transformer.level_embeds", "transformer.level_embed", "level_embed"),
    "query_content.weight": (
        "transformer.tgt_embed.weight",
        "transformer.tgt_embed.weight",
        "query_embedding.weight",
    ),
    "label_embed.weight": (
        "label_enc.weight",
        "label_enc.weight",
        "dn_query_generator.label_embedding.weight",
    ),
}
PROGRAMS = {"detrex": 0, "authors": 1, "mmdetection": 2}


def another_programs(program, model):
    """The state dict of a model in the layout of a program, and where ours cannot be the same."""
    index, state, own = PROGRAMS[program], {}, model.detr.state_dict()
    names = {
        f"{ours}.{kind}": f"{theirs[index]}.{kind}"
        for ours, theirs in {**ENCODER, **DECODER, **HEADS, **PROJECTIONS}.items()
        for kind in ("weight", "bias")
    }
    names |= {ours: theirs[index] for ours, theirs in SINGLE.items()}
    for ours, theirs in names.items():
        state[theirs] = own[ours]
    for layer in (0, 1):
        start = f"decoder.layers.{layer}.self_attn"
        theirs = {
            "detrex": f"transformer.decoder.layers.{layer}.attentions.0.attn",
            "authors": f"transformer.{start}",
            "mmdetection": f"{start}.attn",
        }[program]
        for kind in ("weight", "bias"):
            parts = [own[f"{start}.{letter}_proj.{kind}"] for letter in "qkv"]
            state[f"{theirs}.in_proj_{kind}"] = torch.cat(parts)
    if program != "authors":  # these have no label for padding
        state[SINGLE["label_embed.weight"][index]] = own["label_embed.weight"][:-1]
    if program == "detrex":  # which has the heads twice
        state |= {
            f"transformer.decoder.{k}": v
            for k, v in state.items()
            if k.startswith(("class", "bbox"))
        }
    if program == "mmdetection":  # whose convolutions have no bias before a norm
        state = {k: v for k, v in state.items() if not (k.startswith("neck") and "conv.bias" in k)}
    backbone = {"authors": "backbone.0.body."}.get(program, "backbone.")
    for key, value in model.backbone.state_dict().items():
        state[backbone + key.removeprefix("model.")] = value
    return state


def filled(model, seed=1):
    """Random values everywhere but where all programs have zeros."""
    torch.manual_seed(seed)
    for name, parameter in model.named_parameters():
        if not name.startswith("backbone."):
            nn.init.normal_(parameter)
    with torch.no_grad():
        model.detr.label_embed.weight[-1] = 0
        for projection in model.detr.input_proj:
            projection[0].bias.zero_()
    return model


POSITIONS = {"detrex": {"position_temperature": 10000, "position_offset": -0.5}}


@pytest.mark.parametrize("program", PROGRAMS)
def test_weights_of_other_programs(tmp_path, program):
    """Every tensor finds its place, and every tensor of ours is filled."""
    positions = POSITIONS.get(program, {})
    source = filled(detector(seed=1, **positions))
    state = another_programs(program, source)
    torch.save({"model": state, "optimizer": {}}, tmp_path / "dino.pth")
    model = detector(seed=2, **positions)
    report = load_init_checkpoint(model, str(tmp_path / "dino.pth"), whole=True)
    own, expected = model.state_dict(), source.state_dict()
    assert [key for key in own if not torch.equal(own[key], expected[key])] == []
    assert report.endswith("; 0 of the tensors there are not used"), report

    other = detector(seed=2, num_classes=7, **positions)
    with pytest.raises(ValueError, match="dino.pth' is not of this model: 7 of .*label_embed"):
        load_init_checkpoint(other, str(tmp_path / "dino.pth"), whole=True)
    untouched = {key: value.clone() for key, value in other.state_dict().items()}
    load_init_checkpoint(other, str(tmp_path / "dino.pth"))
    for key, value in other.state_dict().items():
        of_classes = "class_embed" in key or "label_embed" in key
        assert torch.equal(value, untouched[key] if of_classes else expected[key]), key


@pytest.mark.parametrize("program", PROGRAMS)
def test_weights_for_another_encoding_of_positions_are_refused(tmp_path, program):
    wrong = {} if program in POSITIONS else POSITIONS["detrex"]
    model = detector(**wrong)
    torch.save(another_programs(program, model), tmp_path / "dino.pth")
    with pytest.raises(ValueError, match="set model.config_kwargs.position_temperature="):
        load_init_checkpoint(model, str(tmp_path / "dino.pth"))
