"""What the weights of recurrent layers see: ``weight_ih`` the layer's input, ``weight_hh`` the hidden states h[t-1],
from the initial one on; in the reverse direction h[t+1]. A cell of theirs likewise.

The hidden states are the layer's output, so all layers but the last are run once more, one at a time. The projection of
an LSTM (``weight_hr``) sees what no output tells, and stays unseen.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pad_packed_sequence

from bitfront.quant.layers.uses import Use, dense

LAYERS = (torch.lstm, torch.gru, torch.rnn_tanh, torch.rnn_relu)
CELLS = (torch.lstm_cell, torch.gru_cell, torch.rnn_tanh_cell, torch.rnn_relu_cell)


def uses(func: Any, args: Any, kwargs: Any, result: Any) -> Iterator[tuple[Tensor, Use]]:
    """The uses of its weights by one of ``LAYERS`` or ``CELLS``, called as torch's modules do.

    Args:
        func, args, kwargs: the call.
        result: of it.
    """
    if kwargs:  # as no module of torch has them
        return
    if func in CELLS:
        x, state, w_ih, w_hh, *_ = args
        yield w_ih, dense(func.__name__, (x,))
        yield w_hh, dense(func.__name__, (state[0] if isinstance(state, (tuple, list)) else state,))
        return
    packed = isinstance(args[3], (tuple, list))
    x, *args = args
    sizes = args.pop(0) if packed else None
    state, weights, bias, layers, _, _, both, *rest = args
    states = list(state) if isinstance(state, (tuple, list)) else [state]
    directions = 2 if both else 1
    each = len(weights) // (layers * directions)
    batch_axis = 0 if rest and rest[0] else 1
    for n in range(layers):
        at = slice(n * directions, (n + 1) * directions)
        own, first = weights[at.start * each : at.stop * each], [s[at] for s in states]
        if n + 1 < layers:
            given = first if isinstance(state, (tuple, list)) else first[0]
            call = (x, sizes) if packed else (x,)
            output = func(*call, given, own, bias, 1, 0.0, False, both, *rest)[0]
        else:
            output = result[0]
        for direction, (hidden, h0) in enumerate(zip(output.chunk(directions, -1), first[0], strict=True)):
            w_ih, w_hh = own[direction * each : direction * each + 2]
            if sizes is None:
                before = _before(hidden, h0, batch_axis, direction)
            else:
                before = _packed_before(hidden, h0, sizes, direction)
            yield w_ih, dense(func.__name__, (x,), batch_axis, whole=packed)
            yield w_hh, dense(func.__name__, (before,), batch_axis, whole=packed)
        x = output


def _before(hidden: Tensor, h0: Tensor, batch_axis: int, reverse: int) -> Tensor:
    """The state that each step starts from.

    Args:
        hidden: after each step, ``[time, samples, features]`` or samples first.
        h0: ``[samples, features]``.
        batch_axis: where the samples are.
        reverse: whether steps go from the last to the first.
    """
    time = 1 - batch_axis
    steps, h0 = hidden.shape[time] - 1, h0.unsqueeze(time)
    return torch.cat([hidden.narrow(time, 1, steps), h0] if reverse else [h0, hidden.narrow(time, 0, steps)], time)


def _packed_before(hidden: Tensor, h0: Tensor, sizes: Tensor, reverse: int) -> Tensor:
    """Likewise, ``[steps of all, features]``, where samples are packed, so many at each time."""
    padded, lengths = pad_packed_sequence(PackedSequence(hidden, sizes), batch_first=True)
    if reverse:
        before = torch.cat([padded[:, 1:], h0[:, None]], 1)
        before[torch.arange(len(lengths)), lengths - 1] = h0
    else:
        before = torch.cat([h0[:, None], padded[:, :-1]], 1)
    return nn.utils.rnn.pack_padded_sequence(before, lengths, batch_first=True).data
