"""What damping, scaling and precision do where a few inputs are enormous or tokens are few: errors of single matrices on windows held out.

python -m benchmarks.damping

On the calibration windows as they lie in artifacts, and on the first four of them, prunes matrices of three blocks of the dense base to
half by SparseGPT and by ADMM, with several shares of damping, in float32 and (SparseGPT's factor, all of ADMM) in float64. Writes into
benchmarks/damping.json, for each matrix: tokens, inputs, the largest squared norm of an input over the mean, the share of the OAS
estimate, and ||(W - W') X||² / ||W X||² on the windows held out. Takes minutes.
"""

from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks import arguments
from stages.checkpoint.model import load_model
from stages.checkpoint.reader import Checkpoint
from stages.config import compose
from stages.files import BASE, CALIBRATION, read_json, write_json
from stages.pruning.method import Method, prune_matrices
from stages.pruning.patterns import Unstructured
from stages.pruning.shrinkage import oas_share
from stages.pruning.statistics import Gram, _inverse_factor

FILE = Path("benchmarks/damping.json")
LAYERS = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
SHARES = (0.001, 0.01, 0.03, 0.1, 0.3)
FEW = 4  # windows
HALF = Unstructured(sparsity=0.5, comparison_group="matrix")


@torch.no_grad()
def inputs_of(model: torch.nn.Module, names: list[str], windows: torch.Tensor) -> dict[str, torch.Tensor]:
    """What layers read, [tokens, columns], float32."""
    read: dict[str, list[torch.Tensor]] = {name: [] for name in names}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, inputs, __, name=name: read[name].append(inputs[0].flatten(0, 1)))
        for name in names
    ]
    for window in windows:
        model(window[None], use_cache=False)
    for hook in hooks:
        hook.remove()
    return {name: torch.cat(tokens) for name, tokens in read.items()}


def damped(method: Method, share: float, *, per_entry: bool) -> Method:
    return replace(method, damping=replace(method.damping, share=share, shrinkage=per_entry))


class PreciseGram(Gram):
    """A Gram matrix that is factored in float64 at once."""

    def _factored(self, damping: float, per_entry: bool) -> torch.Tensor:
        return _inverse_factor(self.value, self.dead, damping, per_entry, torch.float64)


def error(weight: torch.Tensor, gram: Gram, method: Method, held_out: torch.Tensor) -> float:
    """||(W - W') X||² / ||W X||² after pruning, in the dtype of the weight."""
    (pruned,) = prune_matrices([weight], gram, method, [HALF])
    assert pruned.values is not None
    lost = (weight - pruned.values).float() @ held_out.T
    return float(f"{(lost.double().square().sum() / (weight.float() @ held_out.T).double().square().sum()).item():.4g}")


def figures(weight: torch.Tensor, tokens: torch.Tensor, held_out: torch.Tensor) -> dict[str, object]:
    gram, precise = Gram(tokens.shape[1], tokens.device), PreciseGram(tokens.shape[1], tokens.device)
    for statistic in (gram, precise):
        statistic.add(tokens[None])
        statistic.finish()
    sparsegpt, admm, diagonal = compose.method("sparsegpt"), compose.method("admm"), gram.value.diagonal()

    def errors(method: Method, *, per_entry: bool) -> dict[str, float]:
        return {str(share): error(weight, gram, damped(method, share, per_entry=per_entry), held_out) for share in SHARES}

    found: dict[str, object] = {
        "tokens": len(tokens),
        "columns": len(diagonal),
        "largest_over_mean": round((diagonal.max() / diagonal.mean()).item(), 1),
        "oas_share": float(f"{oas_share(gram.value, gram.tokens):.3g}"),
        "sparsegpt, share of the mean": errors(sparsegpt, per_entry=False),
        "sparsegpt, share of each entry": errors(sparsegpt, per_entry=True),
        "admm, share of each entry": errors(admm, per_entry=True),
        "sparsegpt, share of the mean 0.01, factored in float64": error(weight, precise, sparsegpt, held_out),
    }
    precise.value = precise.value.double()
    return found | {"admm, share of each entry 0.01, in float64": error(weight.double(), precise, admm, held_out)}


def main() -> None:
    base, drawn = Checkpoint(BASE), load_file(CALIBRATION / "windows.safetensors")
    model = load_model(base, None, dtype=torch.float32, device=torch.device("cpu"))
    last = len(model.model.layers) - 1
    names = [f"model.layers.{block}.{layer}" for block in (last // 10, last // 2, last - 2) for layer in LAYERS]
    held_out = inputs_of(model, names, drawn["held_out"])
    known = read_json(FILE) if FILE.is_file() else {}
    of_model = known.setdefault(base.provenance["name"], {})
    for windows in (drawn["windows"], drawn["windows"][:FEW]):
        read = inputs_of(model, names, windows)
        for name in names:
            found = figures(model.get_submodule(name).weight.data, read[name], held_out[name])
            of_model[f"{name}, {len(windows)} windows"] = found
            print(name, found, flush=True)
    write_json(FILE, known)


if __name__ == "__main__":
    arguments.none(__doc__)
    main()
