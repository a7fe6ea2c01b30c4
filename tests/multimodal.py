"""Small random checkpoints of multimodal models, made from their real config classes and saved by transformers."""

from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, MODEL_FOR_MULTIMODAL_LM_MAPPING, PreTrainedModel

from tests.small_models import PLACEHOLDER, small


def model_class(kind: str) -> type[PreTrainedModel]:
    return MODEL_FOR_MULTIMODAL_LM_MAPPING[CONFIG_MAPPING[kind]]


def parameters(kind: str) -> int:
    """Number of parameters of the small model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in model_class(kind)(small(kind)).parameters())


def write(directory: Path, kind: str, **changes: Any) -> Path:
    """A checkpoint in shards, with weights large enough for attention and routing to tell tokens apart."""
    config = small(kind)
    for name, value in changes.items():
        setattr(config.get_text_config(), name, value)
    torch.manual_seed(0)
    model = model_class(kind)(config).eval()
    for parameter in model.parameters():
        random = torch.randn_like(parameter)
        parameter.data = parameter.data + 0.1 * random if parameter.dim() == 1 else random / parameter.shape[-1] ** 0.5
    model.to(torch.bfloat16).save_pretrained(directory, max_shard_size="60KB")
    return directory


def pixels(kind: str) -> dict[str, torch.Tensor]:
    """What a processor makes of a prompt with one image."""
    vision, generator = small(kind).vision_config, torch.Generator().manual_seed(1)
    images = {"gemma3": 4, "llava": 4, "mistral3": 4}
    tokens = images.get(kind, 1)
    ids = torch.tensor([[5, *[PLACEHOLDER] * tokens, 7, 8]])
    of_image = (ids == PLACEHOLDER).long()
    patch = 3 * vision.patch_size**2

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    match kind:
        case "gemma3":
            return {"input_ids": ids, "pixel_values": random(1, 3, 28, 28), "token_type_ids": of_image}
        case "gemma4":
            places = torch.tensor([[[0, 0], [1, 0], [0, 1], [1, 1]]])
            return {"input_ids": ids, "pixel_values": random(1, 4, patch), "image_position_ids": places, "mm_token_type_ids": of_image}
        case "llava" | "llama4":
            return {"input_ids": ids, "pixel_values": random(1, 3, 28, 28)}
        case "mistral3":
            return {"input_ids": ids, "pixel_values": random(1, 3, 56, 56), "image_sizes": torch.tensor([[56, 56]])}
        case _:
            grid = torch.tensor([[1, 2, 2]])
            values = random(4, patch * vision.temporal_patch_size)
            return {"input_ids": ids, "pixel_values": values, "image_grid_thw": grid, "mm_token_type_ids": of_image}
