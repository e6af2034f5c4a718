"""A short hash that tells models apart, so that calibration artifacts meet only the model that they were made for."""

import hashlib
import json

import torch
from transformers import PreTrainedModel

from kvbudget.models.geometry import CacheGeometry

_SAMPLED_PARAMETERS = 16
_SAMPLES = 64
_CONFIG_FIELDS = ("model_type", "hidden_size", "intermediate_size", "vocab_size", "rope_parameters")


def fingerprint(model: PreTrainedModel) -> str:
    """A hash of 16 hexadecimal digits of the architecture, its cache geometry and a sample of its weights.

    It is the same for every device, and for a checkpoint loaded in float32 or bfloat16 (samples are compared in
    bfloat16). Fine-tuned siblings differ. It reads about a thousand numbers, so it is cheap for any size.
    """
    text = model.config.get_text_config(decoder=True)
    geometry = CacheGeometry.from_config(model.config)
    parameters = list(model.named_parameters())
    essentials = {
        "class": type(model).__name__,
        "config": {field: getattr(text, field, None) for field in _CONFIG_FIELDS},
        "layers": [repr(layer) for layer in geometry.layers],
        "parameters": [(name, tuple(parameter.shape)) for name, parameter in parameters],
    }
    digest = hashlib.sha256(json.dumps(essentials, sort_keys=True, default=str).encode())
    for i in _spread(len(parameters), _SAMPLED_PARAMETERS):
        weights = parameters[i][1].detach().flatten()
        samples = weights[torch.tensor(_spread(weights.numel(), _SAMPLES), device=weights.device)]
        digest.update(samples.to("cpu", torch.bfloat16).view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]


def _spread(length: int, count: int) -> list[int]:
    """At most `count` indices below `length`, evenly spread, first and last included."""
    if length <= count:
        return list(range(length))
    return [i * (length - 1) // (count - 1) for i in range(count)]
