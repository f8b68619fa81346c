"""DINO: DETR with improved denoising anchor boxes, https://arxiv.org/abs/2203.03605.

It is transformers' Deformable DETR with what the paper adds: contrastive denoising (section 3.3),
mixed query selection (3.4) and look forward twice (3.5). Importing this module makes it known to
``transformers.AutoConfig`` and ``transformers.AutoModelForObjectDetection``.
"""

import math
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from detectron2.layers.wrappers import shapes_to_tensor
from huggingface_hub.dataclasses import strict
from torch import nn
from torchvision.ops import box_convert, generalized_box_iou_loss, sigmoid_focal_loss
from transformers import AutoConfig, AutoModelForObjectDetection, DeformableDetrConfig
from transformers.loss.loss_deformable_detr import DeformableDetrHungarianMatcher
from transformers.models.deformable_detr.modeling_deformable_detr import (
    DeformableDetrMLPPredictionHead,
    DeformableDetrModel,
    DeformableDetrObjectDetectionOutput,
    inverse_sigmoid,
)
from transformers.models.grounding_dino.modeling_grounding_dino import (
    encode_sinusoidal_position_embedding,
)
from transformers.models.rt_detr.modeling_rt_detr import get_contrastive_denoising_training_group

from .processes import mean_per_process

Predictions = dict[str, torch.Tensor]  # logits (N, queries, classes), pred_boxes (N, queries, 4)
Labels = list[dict[str, torch.Tensor]]
Indices = list[tuple[torch.Tensor, torch.Tensor]]

_EPS = 1e-3  # how near to 0 and 1 the sides of a box are told apart, as in the authors' program


@strict
class DinoConfig(DeformableDetrConfig):
    """The settings of DINO, by default those of its authors' 4-scale model.

    As in detrex each layer of the decoder has its own heads; in the authors' model all share one.

    Attributes:
        num_denoising: about how many boxes are denoised in an image, each from a positive and a
            negative query; 0 is for no denoising.
        label_noise_ratio: twice the share of the denoising queries that get a random class.
        box_noise_scale: by how many halves of a box's width and height its sides move at most;
            those of negative queries move by up to twice as much.
        position_temperature: of the sine encoding of the positions in the maps. The authors and
            mmdetection have 20, detrex has 10000.
        position_offset: what is added to the positions, in pixels of a map. The authors and
            mmdetection have 0, detrex has -0.5.
    """

    model_type = "dino"

    num_queries: int = 900
    encoder_ffn_dim: int = 2048
    decoder_ffn_dim: int = 2048
    dropout: float | int = 0.0
    two_stage: bool = True
    with_box_refine: bool = True
    auxiliary_loss: bool = True
    class_cost: int = 2
    num_denoising: int = 100
    label_noise_ratio: float | int = 0.5
    box_noise_scale: float | int = 1.0
    position_temperature: float | int = 20
    position_offset: float | int = 0.0

    def validate_architecture(self):
        """Refuse what is not DINO. transformers calls it."""
        for key in ("two_stage", "with_box_refine", "auxiliary_loss"):
            if not getattr(self, key):
                raise ValueError(f"{key}=False must be True in DINO")
        if self.position_embedding_type != "sine":
            raise ValueError(
                f"position_embedding_type={self.position_embedding_type!r} must be 'sine' in DINO"
            )
        if self.two_stage_num_proposals != DeformableDetrConfig.two_stage_num_proposals:
            raise ValueError("two_stage_num_proposals must be left out in DINO: it is num_queries")
        for key in ("encoder_layers", "position_temperature"):
            if getattr(self, key) <= 0:
                raise ValueError(f"{key}={getattr(self, key)} must be more than 0")
        if self.num_denoising < 0:
            raise ValueError(f"num_denoising={self.num_denoising} must be at least 0")
        if not 0 <= self.label_noise_ratio <= 2:
            raise ValueError(f"label_noise_ratio={self.label_noise_ratio} must be from 0 to 2")
        if self.box_noise_scale <= 0:
            raise ValueError(f"box_noise_scale={self.box_noise_scale} must be more than 0")


class Dino(DeformableDetrModel):
    """DINO, with random weights."""

    config_class = DinoConfig

    def __init__(self, config: DinoConfig):
        super().__init__(config)
        del self.pos_trans, self.pos_trans_norm  # of the queries that Deformable DETR selects
        width, layers = config.d_model, config.decoder_layers
        self.query_content = nn.Embedding(config.num_queries, width)
        self.label_embed = nn.Embedding(config.num_labels + 1, width, padding_idx=config.num_labels)
        self.label_embed.requires_grad_(config.num_denoising > 0)
        self.ref_point_head = DeformableDetrMLPPredictionHead(2 * width, width, width, 2)
        self.decoder_norm = nn.LayerNorm(width)
        # one head for each layer of the decoder, and the last for the encoder
        self.class_embed = nn.ModuleList(
            nn.Linear(width, config.num_labels) for _ in range(layers + 1)
        )
        self.bbox_embed = nn.ModuleList(
            DeformableDetrMLPPredictionHead(width, width, 4, 3) for _ in range(layers + 1)
        )
        self.matcher = DeformableDetrHungarianMatcher(
            config.class_cost, config.bbox_cost, config.giou_cost
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw the weights as the authors' program and detrex do."""
        for name, module in self.named_modules():
            if name.startswith("backbone.") or not isinstance(module, (nn.Linear, nn.Conv2d)):
                continue
            module.reset_parameters()
            if name.startswith(("class_embed.", "bbox_embed.")):
                continue
            # of queries, keys and values there is one matrix in those programs
            is_part = name.endswith(("q_proj", "k_proj", "v_proj"))
            nn.init.xavier_uniform_(module.weight, gain=2**-0.5 if is_part else 1)
            if ".self_attn." in name or name.startswith("input_proj."):
                nn.init.zeros_(module.bias)
        for module in self.modules():  # once more: their offsets are not random
            if hasattr(module, "sampling_offsets"):
                self._init_weights(module)
        nn.init.xavier_uniform_(self.query_content.weight)
        self.label_embed.reset_parameters()
        for classes, box in zip(self.class_embed, self.bbox_embed):
            nn.init.constant_(classes.bias, -math.log(99))  # a probability of 0.01
            nn.init.zeros_(box.layers[-1].weight)
            nn.init.zeros_(box.layers[-1].bias)

    def forward(
        self,
        pixel_values: torch.Tensor,
        pixel_mask: torch.Tensor,
        labels: Labels | None = None,
    ) -> DeformableDetrObjectDetectionOutput:
        """
        Args:
            pixel_values: normalized images (N, 3, H, W).
            pixel_mask: (N, H, W), 1 for pixels of the image, 0 for padding.
            labels: for each image ``class_labels`` (n,) and ``boxes`` (n, 4), which are cx, cy, w,
                h as fractions of the image; needed for losses.

        Returns:
            ``logits`` (N, queries, classes), ``pred_boxes`` (N, queries, 4) as those of ``labels``,
            and where there are labels the weighted losses in ``loss_dict``, their sum in ``loss``.
        """
        memory = self._encode(pixel_values, pixel_mask)
        proposals = self._propose(memory)
        queries = self.query_content.weight.expand(pixel_values.shape[0], -1, -1)
        boxes, mask, noise, count = proposals["pred_boxes"].detach(), None, None, 0
        if self.training and labels is not None:
            noised, noised_boxes, mask, noise = self._denoise(labels)
        if noise is not None:  # there are boxes
            queries = torch.cat([noised, queries], 1)
            boxes = torch.cat([noised_boxes.sigmoid(), boxes], 1)
            count = noise["dn_num_split"][0]
        layers = self._decode(memory, queries, boxes, mask)
        matched = [{key: value[:, count:] for key, value in layer.items()} for layer in layers]
        losses, loss = None, None
        if labels is not None:
            num_boxes = mean_per_process(sum(len(label["boxes"]) for label in labels))
            losses = self._losses(proposals, matched, labels, num_boxes)
            if self.training and self.config.num_denoising:
                losses |= self._denoising_losses(layers, labels, noise, num_boxes)
            loss = sum(losses.values())
        return DeformableDetrObjectDetectionOutput(loss=loss, loss_dict=losses, **matched[-1])

    def _encode(self, pixel_values: torch.Tensor, pixel_mask: torch.Tensor) -> "_Memory":
        """The maps of the backbone, and coarser ones, through the encoder."""
        features, masks = map(list, zip(*self.backbone(pixel_values, pixel_mask)))
        maps = [project(feature) for project, feature in zip(self.input_proj, features)]
        for project in self.input_proj[len(features) :]:
            maps.append(project(features[-1] if len(maps) == len(features) else maps[-1]))
            size = maps[-1].shape[-2:]
            masks.append(F.interpolate(pixel_mask[None].float(), size=size)[0].bool())
        shapes = [tuple(level.shape[-2:]) for level in maps]
        positions = [
            self._positions(mask).flatten(1, 2) + embed
            for mask, embed in zip(masks, self.level_embed)
        ]
        mask = torch.cat([mask.flatten(1) for mask in masks], 1)
        sizes = torch.stack([shapes_to_tensor(shape, mask.device) for shape in shapes])
        levels = {
            "spatial_shapes": sizes,
            "spatial_shapes_list": shapes,
            "level_start_index": sizes.prod(1).cumsum(0) - sizes.prod(1),
        }
        valid_ratios = torch.stack([self.get_valid_ratio(mask) for mask in masks], 1)
        tokens = self.encoder(
            inputs_embeds=torch.cat([level.flatten(2).transpose(1, 2) for level in maps], 1),
            attention_mask=mask,
            spatial_position_embeddings=torch.cat(positions, 1),
            valid_ratios=valid_ratios,
            **levels,
        ).last_hidden_state
        return _Memory(tokens, mask, valid_ratios, levels)

    def _positions(self, mask: torch.Tensor) -> torch.Tensor:
        """The sine encoding of the positions of a map, (N, h, w, width), from its mask."""
        y, x = mask.cumsum(1, dtype=torch.float32), mask.cumsum(2, dtype=torch.float32)
        offset = self.config.position_offset
        y = (y + offset) / (y[:, -1:] + 1e-6)
        x = (x + offset) / (x[:, :, -1:] + 1e-6)
        return encode_sinusoidal_position_embedding(
            torch.stack([x, y], -1), self.config.d_model // 2, self.config.position_temperature
        )

    def _propose(self, memory: "_Memory") -> Predictions:
        """Mixed query selection (section 3.4): the best positions give the queries' boxes."""
        shapes = memory.levels["spatial_shapes_list"]
        features, start = self.gen_encoder_output_proposals(memory.tokens, ~memory.mask, shapes)
        logits = self.class_embed[-1](features).float()
        boxes = (self.bbox_embed[-1](features) + start).sigmoid()
        best = logits.max(-1).values.topk(self.config.num_queries, dim=1).indices[..., None]
        return {
            "logits": logits.gather(1, best.expand(-1, -1, logits.shape[2])),
            "pred_boxes": boxes.gather(1, best.expand(-1, -1, 4)),
        }

    def _denoise(self, labels: Labels) -> tuple:
        """Contrastive denoising (section 3.3); four times None where there is nothing to denoise.

        Returns:
            queries (N, n, width), logits of their boxes (N, n, 4), the mask (n + queries, n +
            queries) that is added to the scores of the decoder's self-attention, and which query
            stands for what.
        """
        config = self.config
        queries, boxes, mask, noise = get_contrastive_denoising_training_group(
            labels,
            config.num_labels,
            config.num_queries,
            self.label_embed,
            config.num_denoising,
            config.label_noise_ratio,
            config.box_noise_scale,
        )
        if noise is not None:
            # Where an image has fewer boxes than another the label is padding, whose embedding is
            # zero, and in the authors' program the logits of the box are too.
            most = math.log((1 - _EPS) / _EPS)
            boxes = boxes.clamp(-most, most) * queries.any(-1, keepdim=True)
        return queries, boxes, mask, noise

    def _decode(
        self,
        memory: "_Memory",
        queries: torch.Tensor,
        boxes: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> list[Predictions]:
        """The predictions of each layer, refined from layer to layer.

        Look forward twice (section 3.5): the boxes that a layer reads have no gradient, but those
        that its prediction is added to have that of the layer before.
        """
        scale = memory.valid_ratios.repeat(1, 1, 2)[:, None]
        layers = []
        for layer, classes, box in zip(self.decoder.layers, self.class_embed, self.bbox_embed):
            read = boxes.detach()
            scaled = read[:, :, None] * scale
            encoding = encode_sinusoidal_position_embedding(
                scaled[:, :, 0], self.config.d_model // 2
            )
            queries = layer(
                queries,
                self.ref_point_head(encoding),
                scaled,
                encoder_hidden_states=memory.tokens,
                encoder_attention_mask=memory.mask,
                attention_mask=mask,
                **memory.levels,
            )
            normed = self.decoder_norm(queries)
            predicted = (box(normed) + inverse_sigmoid(boxes, _EPS)).sigmoid()
            layers.append({"logits": classes(normed).float(), "pred_boxes": predicted})
            boxes = (box(queries) + inverse_sigmoid(read, _EPS)).sigmoid()
        return layers

    def _losses(
        self,
        proposals: Predictions,
        layers: list[Predictions],
        labels: Labels,
        num_boxes: float,
    ) -> dict[str, torch.Tensor]:
        """The losses of the encoder's proposals and of each layer, boxes matched to queries."""
        losses = {}
        for end, predicted in zip(("_enc", *_ends(layers)), (proposals, *layers)):
            finite = {key: value.nan_to_num() for key, value in predicted.items()}  # or it fails
            indices = self.matcher(finite, labels)
            losses |= self._loss(predicted, labels, indices, num_boxes, end)
        return losses

    def _denoising_losses(
        self, layers: list[Predictions], labels: Labels, noise: dict | None, num_boxes: float
    ) -> dict[str, torch.Tensor]:
        """The losses of each layer for the denoising queries, whose boxes are known."""
        if noise is None:  # a process without a box has the losses and gradients of the others
            nothing = 0 * self.label_embed.weight.sum()
            names = ("loss_ce", "loss_bbox", "loss_giou")
            return {f"{name}_dn{end}": nothing for end in _ends(layers) for name in names}
        count, groups = noise["dn_num_split"][0], noise["dn_num_group"]
        indices = [
            (positive, torch.arange(len(label["boxes"]), device=positive.device).tile(groups))
            for positive, label in zip(noise["dn_positive_idx"], labels)
        ]
        losses = {}
        for end, layer in zip(_ends(layers), layers):
            predicted = {key: value[:, :count] for key, value in layer.items()}
            losses |= self._loss(predicted, labels, indices, groups * num_boxes, f"_dn{end}")
        return losses

    def _loss(
        self, predicted: Predictions, labels: Labels, indices: Indices, num_boxes: float, end: str
    ) -> dict[str, torch.Tensor]:
        """Focal, L1 and GIoU loss.

        Args:
            predicted: of some queries.
            labels: see :meth:`forward`.
            indices: for each image the queries that have a box, and which one.
            num_boxes: to divide by.
            end: of the losses' names.
        """
        logits = predicted["logits"]
        image = torch.cat([torch.full_like(query, i) for i, (query, _) in enumerate(indices)])
        query = torch.cat([query for query, _ in indices])
        pairs = [*zip(labels, (box for _, box in indices))]
        classes = torch.cat([label["class_labels"][box] for label, box in pairs])
        boxes = torch.cat([label["boxes"][box] for label, box in pairs])
        target = torch.zeros_like(logits)
        target[image, query, classes] = 1
        found = predicted["pred_boxes"][image, query]
        corners = (box_convert(each, "cxcywh", "xyxy") for each in (found, boxes))
        config = self.config
        focal = sigmoid_focal_loss(logits, target, config.focal_alpha, gamma=2, reduction="sum")
        l1 = F.l1_loss(found, boxes, reduction="sum")
        giou = generalized_box_iou_loss(*corners, reduction="sum")
        return {
            f"loss_ce{end}": focal / num_boxes,
            f"loss_bbox{end}": config.bbox_loss_coefficient * l1 / num_boxes,
            f"loss_giou{end}": config.giou_loss_coefficient * giou / num_boxes,
        }


class _Memory(NamedTuple):
    """What the encoder gives the decoder.

    Attributes:
        tokens: (N, positions, width), those of all maps, fine to coarse.
        mask: (N, positions), True where there is an image.
        valid_ratios: (N, maps, 2), the part of each map's width and height that has an image.
        levels: the maps' sizes and beginnings, as transformers' deformable attention takes them.
    """

    tokens: torch.Tensor
    mask: torch.Tensor
    valid_ratios: torch.Tensor
    levels: dict[str, Any]


def _ends(layers: list[Predictions]) -> list[str]:
    """What the names of each layer's losses end on; those of the last layer on nothing."""
    return [*(f"_{i}" for i in range(len(layers) - 1)), ""]


AutoConfig.register(DinoConfig.model_type, DinoConfig)
AutoModelForObjectDetection.register(DinoConfig, Dino)
