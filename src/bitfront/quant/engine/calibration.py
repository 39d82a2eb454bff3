"""Post-training quantization, block by block (decoupleQ, arXiv 2404.12759, section 3; GPTQ's "true-sequential").

For each block of the network, in the order in which they are called:

1. its inputs are captured from a forward of the network so far, whose earlier blocks are quantized already;
2. the target is kept: what the float network gives there, or, as in the paper, what the block, still float, makes of
   these inputs;
3. layer by layer, the second moments ``H = E[x xᵀ]`` of the inputs are measured and the method solves for the weight;
   layers that share an input share its ``H``; with ``propagation`` it solves for what gives the float network's outputs
   on these inputs;
4. the values of all codes of the block, and its norms, are tuned so that its output is closest to the target.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from bitfront.progress import Bar
from bitfront.quant.core import Distilled, Method, check
from bitfront.quant.engine.block import quantize_block, several, solve
from bitfront.quant.engine.blockwise import norm_parameters
from bitfront.quant.engine.by_blocks import ByBlocks
from bitfront.quant.engine.frozen import Frozen
from bitfront.quant.engine.moving import Moving
from bitfront.quant.engine.plan import Calibration, plan
from bitfront.quant.engine.route import Exact, Route
from bitfront.quant.engine.sensitivity import at_the_end
from bitfront.quant.engine.states import States, fingerprint
from bitfront.quant.forwards.offload import Offload
from bitfront.quant.forwards.together import check_alike, together
from bitfront.quant.forwards.undisturbed import undisturbed
from bitfront.quant.layers.felt import Felt, FeltOutputs, felt, felt_outputs
from bitfront.quant.layers.inputs import no_fast_path
from bitfront.quant.log import blind_share
from bitfront.quant.model import QuantizedModel, Quantizer, check_finite, check_quantizable
from bitfront.quant.storage.packed import Packed

STAGES = ("between", "moving", "held_out")  # of the tuning of a block, as its entry in the log has them


@dataclass(kw_only=True)
class PostTraining(ByBlocks, Distilled):
    """A method that quantizes a trained network.

    Attributes:
        sft: fine-tune on the task's labels with the training loop and recipe (``train.*``): codes stay, their values
            and the norms learn.
        sft_relative: its learning rate is in units of each tensor's distance of values; else as in the paper, s and z
            are learned as they are.
        sft_codes: codes learn, too, straight through (``moving``).
    """

    sft: bool = False
    sft_relative: bool = True
    sft_codes: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check(self.sees_inputs or not self.propagation, "propagation is of a method that looks at what layers see")
        at_work = self.tunes or self.block_loss == "squared"
        check(at_work, f"block_loss={self.block_loss} is of the block-wise stage; give J, moving or between with it")
        for option in ("sft_codes", "distill"):
            check(self.sft or not getattr(self, option), f"{option} is of fine-tuning; give sft=true with it")

    @property
    def needs_data(self) -> bool:
        """Whether it looks at any."""
        return self.calibrates or self.max_size > 0

    def attach(self, network: nn.Module, data: Calibration | None = None) -> QuantizedModel:
        """Quantize a trained network; its weights are overwritten. Processes of a group do it together, each with
        batches of its own.

        Raises:
            BitfrontError: there is no data, or a layer cannot be quantized as asked.
        """
        with together(self.needs_data):
            there = not self.needs_data or (data is not None and not data.empty)
            check(there, f"{type(self).__name__} needs calibration data")
            check_quantizable(network, self.eligible(network))
            check_finite(network)
            before = {name: w.detach().clone() for name, w in self.eligible(network).items()} if self.sft_codes else {}
            packed, log = calibrate(network, self, data)
        frozen: dict[str, Quantizer] = {}
        for name, p in packed.items():
            how = self.of(name).keeps_zero, self.sft_relative
            frozen[name] = Moving(p, before[name], *how) if name in before else Frozen(p, self.sft, *how)
        if self.sft:
            norms = {name for name, _ in norm_parameters(network)} - packed.keys()
            for name, own in network.named_parameters():
                own.requires_grad_(name in norms)
        model = QuantizedModel(network, frozen, self)
        model.log = log
        return model


def calibrate(
    network: nn.Module, method: PostTraining, data: Calibration | None
) -> tuple[dict[str, Packed], dict[str, Any]]:
    """Quantize a network block by block; its weights become the quantized ones, all else stays as it was.

    Args:
        network: float, on the device to work on, or, if it does not fit there, on the CPU.
        method: solves the layers.
        data: to calibrate on, where the method does.

    Returns:
        Packed tensors by name, and a log for the record: of layers and blocks; where ``solve`` makes use of what layers
        see, which share of the weights it had to do without (``blind``, 0..1); how many blocks were ``tuned``, if any
        were to be.

    Raises:
        BitfrontError: an input is not finite, settings do not fit a layer, or a state cannot be read or written.
    """
    weights = method.eligible(network)
    log: dict[str, Any] = {"layers": [], "blocks": []}
    found: dict[str, Packed] = {}
    if data is None or not method.calibrates:
        for name, w in weights.items():
            found[name], entry = solve(method, name, w, None)
            log["layers"].append(entry | {"block": ""})
        return found, log
    asks = "hessian" if method.feels == "end" else "block_loss"
    whole = f"{asks}=fisher needs gradients of the whole network at once; leave offload out"
    check(not data.offload or not method.feels_the_end, whole)
    check_processes(network, method, data)
    rest = data.offloaded(network)
    with undisturbed(network), no_fast_path(), rest.streamed():
        network.eval()
        for state in _walk(network, method, weights, data, rest):
            for name, fields in state["packed"].items():
                p = Packed(**fields).to(weights[name].device)
                found[name] = replace(p, codes=rest.stays(p.codes)) if rest.place else p
            log["layers"] += state["layers"]
            log["blocks"].append(state["block"])
    if method.sees_inputs:
        log["blind"] = blind_share(log["layers"])
    if method.tunes:
        log["tuned"] = sum(any(block.get(stage) for stage in STAGES) for block in log["blocks"])
    return {name: found[name] for name in weights}, log


def check_processes(network: nn.Module, method: Method, data: Calibration) -> None:
    """Refuse processes with different networks or settings.

    Raises:
        BitfrontError: there are such.
    """
    check_alike(
        lambda: fingerprint(dict(network.named_parameters()), method, data.blocks, data.seed),
        "the processes have not the same weights, method, blocks and seed; each needs the whole network from one file, "
        "and data of its own alone",
    )


def _walk(
    network: nn.Module, method: PostTraining, weights: dict[str, nn.Parameter], data: Calibration, rest: Offload
) -> Iterator[dict[str, Any]]:
    """Quantize one block after the other, or take what an earlier attempt left of it; the state of each."""
    units = plan(network, weights, data) if weights else []
    states = States(data.states, network, method, data) if data.states else None
    end: Felt = {}
    outputs: FeltOutputs = {}
    dtype = method.computed_in(rest.device)
    along = {unit.block for unit in units if several(network, unit)}
    if units and method.feels_the_end and not (states and all(map(states.load, range(len(units))))):
        if method.feels == "end":
            end = felt_at_the_end(network, weights, data, units[-1].time_last, dtype)
        if method.weighs_outputs:
            with at_the_end(network, data, units[-1].time_last, dtype) as passes:
                outputs = felt_outputs({block: network.get_submodule(block) for block in sorted(along)}, passes)
    here = Route(network, data, rest)
    exact = Exact(network, data, rest) if method.follows else None
    anew = [unit.block in along and not (unit.link and unit.link.before in along) for unit in units]
    bar = Bar(units, unit="block")
    for n, unit in enumerate(bar):
        bar.set_description(unit.block, refresh=False)
        state = states.load(n) if states else None
        if exact and (state or any(anew[n + 1 :])):
            exact.keep(unit)
        if state is None:
            state = quantize_block(here, exact, method, unit, weights, end, outputs.get(unit.block, {}), n)
            if states:
                states.save(n, state)
        for name, fields in state["packed"].items():
            weights[name].data.copy_(Packed(**fields).decode())
        for name, p in state["norms"].items():
            network.get_parameter(name).data.copy_(p)
        yield state


def felt_at_the_end(
    network: nn.Module,
    weights: dict[str, nn.Parameter],
    data: Calibration,
    time_last: bool = False,
    dtype: torch.dtype = torch.float32,
) -> Felt:
    """What of the inputs of all layers the end of the float network feels.

    Args:
        network, weights, data: of the calibration.
        time_last: where padding is, in outputs, as of a ``Unit``.
        dtype: of products.
    """
    with at_the_end(network, data, time_last, dtype) as passes:
        return felt(weights, passes)
