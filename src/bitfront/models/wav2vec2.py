"""torchaudio's wav2vec 2.0 (arXiv 2006.11477) for CTC, with plain weights, and independent of padding."""

from __future__ import annotations

import pickle
from typing import Any

import torch
import torchaudio
from torch import Tensor, nn
from torch.nn.utils.parametrize import remove_parametrizations

from bitfront.errors import BitfrontError

URL = "https://download.pytorch.org/torchaudio/models/wav2vec2_fairseq_base_ls960_asr_ls960.pth"

BASE = {  # of torchaudio.pipelines.WAV2VEC2_ASR_BASE_960H
    "extractor_mode": "group_norm",
    "extractor_conv_layer_config": [(512, 10, 5), *[(512, 3, 2)] * 4, *[(512, 2, 2)] * 2],
    "extractor_conv_bias": False,
    "encoder_embed_dim": 768,
    "encoder_projection_dropout": 0.1,
    "encoder_pos_conv_kernel": 128,
    "encoder_pos_conv_groups": 16,
    "encoder_num_layers": 12,
    "encoder_num_heads": 12,
    "encoder_attention_dropout": 0.1,
    "encoder_ff_interm_features": 3072,
    "encoder_ff_interm_dropout": 0.0,
    "encoder_dropout": 0.1,
    "encoder_layer_norm_first": False,
    "encoder_layer_drop": 0.0,  # published with 0.05, which leaves parameters without a gradient
}
TINY = BASE | {
    "extractor_conv_layer_config": [(32, 10, 5), (32, 8, 4), (32, 4, 4), (32, 4, 4)],
    "encoder_embed_dim": 64,
    "encoder_pos_conv_kernel": 16,
    "encoder_pos_conv_groups": 4,
    "encoder_num_layers": 2,
    "encoder_num_heads": 2,
    "encoder_ff_interm_features": 128,
}
SIZES = {"wav2vec2": BASE, "wav2vec2_tiny": TINY}


class Wav2Vec2CTC(nn.Module):
    """One utterance at a time: its first norm is over time, so that padding would change results.

    Args:
        options: of ``torchaudio.models.wav2vec2_model``, as ``BASE``.
        outputs: labels, the blank among them.
    """

    def __init__(self, options: dict[str, Any], outputs: int) -> None:
        super().__init__()
        self.wav2vec2 = plain(torchaudio.models.wav2vec2_model(**options, aux_num_out=outputs))

    def forward(self, x: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
        """Logits ``[batch, frames, outputs]`` and their lengths, from samples ``x`` ``[batch, time]``."""
        rows = [self.wav2vec2(row[None, :n])[0][0] for row, n in zip(x, lengths.tolist(), strict=True)]
        frames = torch.tensor([len(row) for row in rows], device=x.device)
        return nn.utils.rnn.pad_sequence(rows, batch_first=True), frames


def plain(model: nn.Module) -> nn.Module:
    """The model with its weight norm multiplied out, in place: quantizers work on weights."""
    for module in model.modules():
        if nn.utils.parametrize.is_parametrized(module, "weight"):
            remove_parametrizations(module, "weight")
    return model


def published() -> dict[str, Tensor]:
    """The weights of torchaudio's ``WAV2VEC2_ASR_BASE_960H`` for ``Wav2Vec2CTC(BASE, 29)``.

    Raises:
        BitfrontError: they are not there and cannot be fetched.
    """
    try:
        model = torchaudio.pipelines.WAV2VEC2_ASR_BASE_960H.get_model()
    except (OSError, RuntimeError, pickle.UnpicklingError) as error:
        raise BitfrontError(
            f"could not load the weights of wav2vec 2.0 ({error}); where there is no network, put {URL} into "
            f"{torch.hub.get_dir()}/checkpoints, or give init_from=<artifact>"
        ) from None
    return {f"wav2vec2.{name}": value for name, value in plain(model).state_dict().items()}
