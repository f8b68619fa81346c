"""DINO of four scales on a timm ResNet-50; a config changes the backbone."""

from .detr import model

model.architecture = "dino"
model.num_queries = 900
