"""Statistics that are kept: a point pruned for them has the bytes of one for which the windows run through every block."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf.errors import InterpolationResolutionError
from safetensors.torch import load_file, save_file

from benchmarks.memory import write_windows
from stages import observe, prune
from stages.checkpoint.reader import Checkpoint
from stages.config.compose import read
from stages.errors import ConfigError, SparsesweepError
from stages.files import BASE, CALIBRATION, KEPT_MANIFEST, PRUNE_JOURNAL, PRUNE_RESULTS, SPARSE, STATISTICS, read_json, sha256, write_json
from stages.pruning import kept
from stages.pruning.section import Kept, Prune
from stages.streaming.decoder import Decoder
from tests.dependencies import code_of
from tests.processes import forks
from tests.project import ROOT
from tests.pruning.test_architectures import fetched

SMALL = ["prune.device=cpu", "prune.dtype=float32", "prune.micro_batch=2", "prune.error_tokens=60", "method.damping.limit=100"]
POINTS = {
    "wanda": ["method=wanda"],
    "wanda, sparser": ["method=wanda", "pattern.sparsity=0.75"],
    "wanda 2:4": ["method=wanda", "pattern=nm_2_4"],
    "ria": ["method=ria"],
    "ria 2:4": ["method=ria", "pattern=nm_2_4"],
    "magnitude": ["method=magnitude"],
    "dsnot": ["method=dsnot"],
    "wanda, owl": ["method=wanda", "allocation=owl"],
}
OF_GRAM = {
    "sparsegpt": ["method=sparsegpt", "method.update.block_size=16"],
    "sparsegpt 2:4": ["method=sparsegpt", "method.update.block_size=16", "pattern=nm_2_4"],
    "shrunk": ["method=sparsegpt", "method.update.block_size=16", "method.damping.shrinkage=true"],
    "swaps": ["method=swaps"],
    "wanda of gram": ["method=wanda", "pattern.sparsity=0.6"],
}


def project_of(kind: str, directory: Path) -> Path:
    """A directory in which observe and prune can run, on a small checkpoint of this architecture."""
    (directory / "artifacts").mkdir()
    fetched(kind, directory / "artifacts")
    shutil.rmtree(directory / "artifacts/source")
    draw_windows(directory)
    return directory


def draw_windows(directory: Path = Path(), seed: int = 0) -> None:
    write_windows(directory, torch.randint(3, 96, (5, 24), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture()
def project(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return project_of("llama", tmp_path)


def section(*overrides: str) -> Prune:
    return read(*SMALL, "prune=one_pass", *overrides)["prune"]


def observed(*overrides: str) -> dict[str, bytes]:
    """Run the observe stage; what it wrote, file by file."""
    observe.main.function(prune=section(*overrides))
    return {path.name: path.read_bytes() for path in STATISTICS.iterdir()}


def pruned(*overrides: str) -> dict[str, bytes]:
    """Run the prune stage; everything that a later stage reads, file by file."""
    sections = read(*SMALL, "prune=one_pass", *overrides)
    prune.main.function(**{name: sections[name] for name in ("method", "pattern", "allocation", "reconstruction", "prune")})
    return {path.name: path.read_bytes() for path in [*SPARSE.iterdir(), PRUNE_RESULTS / "sparsity.json"]}


def was_read() -> str | None:
    """The kind of kept statistics that the last prune stage read."""
    return read_json(PRUNE_RESULTS / "provenance.json")["kept_statistics"]


NORMS, GRAM = "prune.statistics=norms", "prune.statistics=gram"


@pytest.mark.parametrize(
    ("kind", "names"),
    [
        *((kind, [*POINTS, *OF_GRAM]) for kind in ("llama", "mixtral")),
        *((kind, ["wanda", "sparsegpt"]) for kind in ("gpt2", "gpt_oss", "falcon_h1")),  # transposed, stacked, beside a recurrence
    ],
)
def test_a_point_has_the_same_bytes_from_kept_statistics(kind, names, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    project_of(kind, tmp_path)
    expected = {name: pruned(*({**POINTS, **OF_GRAM}[name])) for name in names}
    for statistics, points in ((NORMS, POINTS), (GRAM, OF_GRAM)):
        observed(statistics)
        for name in (name for name in names if name in points):
            assert pruned(statistics, *points[name]) == expected[name], name
            assert was_read() == statistics.removeprefix("prune.statistics=")


def test_a_point_in_half_precision_has_the_same_bytes_from_kept_statistics(project):
    half = "prune.dtype=bfloat16"
    expected = pruned(half)
    observed(NORMS, half)
    assert pruned(NORMS, half) == expected
    assert was_read() == "norms"


def test_windows_need_not_be_held_out(project):
    path = CALIBRATION / "windows.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "held_out": tensors["held_out"][:0]}, path)
    write_json(CALIBRATION / "provenance.json", {**read_json(CALIBRATION / "provenance.json"), "windows_sha256": sha256(path)})
    expected = pruned()
    observed(NORMS)
    assert pruned(NORMS) == expected
    assert was_read() == "norms"


def test_no_window_runs_and_no_hidden_state_is_kept(project, monkeypatch):
    observed(NORMS)

    def refused(*_: object, **__: object) -> None:
        raise AssertionError("a window was about to run")

    monkeypatch.setattr(prune, "stream_of", refused)
    monkeypatch.setattr(Decoder, "before_blocks", refused)
    pruned(NORMS)
    assert read_json(PRUNE_RESULTS / "provenance.json")["hidden_states"] is None
    with pytest.raises(AssertionError, match="a window was about to run"):
        pruned()


@pytest.mark.parametrize(
    ("overrides", "reason"),
    [
        (["method=sparsegpt"], "sparsegpt needs Gram"),
        (["pattern=nm_2_4_permuted"], "columns are permuted"),
    ],
)
def test_where_kept_statistics_are_of_no_use_the_windows_run_and_the_log_says_why(project, caplog, overrides, reason):
    expected = pruned(*overrides)
    observed(NORMS)
    assert pruned(NORMS, *overrides) == expected
    assert was_read() is None
    assert f"the windows run through all blocks: what prune.statistics=norms keeps is of no use, since {reason}" in caplog.text


def test_nothing_is_read_unless_it_is_asked_for(project):
    observed(NORMS)
    pruned()
    assert was_read() is None


def test_a_run_that_was_killed_goes_on(project, monkeypatch):
    expected = pruned(NORMS) if observed(NORMS) else None
    write, calls = prune.Journal.write, []

    def interrupted(*arguments: object) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        write(*arguments)

    monkeypatch.setattr(prune.Journal, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pruned(NORMS)
    assert PRUNE_JOURNAL.exists()
    monkeypatch.setattr(prune.Journal, "write", write)
    assert pruned(NORMS) == expected
    assert read_json(PRUNE_RESULTS / "provenance.json")["resumed_after"] == 1


# What is refused.


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["prune=exact", NORMS], "prune.propagate: found 'pruned', wanted dense with prune.statistics = norms"),
        (["prune=sequential", GRAM], "prune.propagate: found 'sequential', wanted dense with prune.statistics = gram"),
        (["prune=one_pass_kept", "prune.processes=2"], "prune.processes: found 2, wanted 1 with prune.statistics = norms"),
        (["prune=one_pass", "prune.statistics=all"], "prune.statistics: found 'all', wanted one of none, norms, gram"),
        (["prune=one_pass_kept", "reconstruction=block"], "reconstruction.name: found 'block', wanted none with prune.propagate = dense"),
    ],
)
def test_what_kept_statistics_cannot_serve_is_refused_when_it_is_composed(overrides, message):
    with pytest.raises(InterpolationResolutionError, match=message):
        read(*overrides)


@pytest.mark.parametrize("run", [observed, pruned])
def test_processes_that_torchrun_started_are_refused_by_both_stages(project, monkeypatch, run):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "one")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(Checkpoint, "tensor", None)
    with pytest.raises(ConfigError, match="prune.processes: found 2, wanted 1 with prune.statistics = norms"):
        run(NORMS)


@pytest.mark.parametrize("statistics", [NORMS, GRAM])
def test_a_disk_that_does_not_hold_them_is_refused_before_a_weight_is_read(project, monkeypatch, statistics, caplog):
    files = observed(statistics)
    written = sum(map(len, files.values()))
    needed = bound(statistics)
    headers = sum(len(content) - tensor_bytes(name) for name, content in files.items() if name != KEPT_MANIFEST)
    assert needed / 2 < written - headers <= needed
    shutil.rmtree(STATISTICS)
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=needed - 1))
    monkeypatch.setattr(Checkpoint, "tensor", None)
    caplog.set_level("INFO")
    with pytest.raises(SparsesweepError, match=r"artifacts/statistics: found 0.00 GB free on its disk, wanted 0.00 GB"):
        observed(statistics)
    assert f"statistics of 3 blocks ({statistics}) take at most 0.00 GB of disk, of which 0.00 GB are free" in caplog.text
    assert not STATISTICS.exists()


def bound(statistics: str) -> int:
    """Bytes by the bound that is computed before anything is written."""
    decoder = Decoder(Checkpoint(BASE), torch.float32, torch.device("cpu"))
    return sum(kept.block_bytes(decoder, Kept(statistics.partition("=")[2]), 60, (5, 24), (2, 24)))


def tensor_bytes(name: str) -> int:
    return sum(tensor.nbytes for tensor in load_file(STATISTICS / name).values())


def change_base() -> None:
    facts = read_json(BASE / "provenance.json")
    name = next(BASE.glob("*.safetensors")).name
    write_json(BASE / "provenance.json", {**facts, "files": {**facts["files"], name: "0" * 64}})


def change_config() -> None:
    write_json(BASE / "config.json", {**read_json(BASE / "config.json"), "rms_norm_eps": 0.1})


def change_kind() -> None:
    observed(GRAM)


STALE = {
    "another base": (change_base, "base: found {hash}, wanted {hash}"),
    "another config": (change_config, "config: found {hash}, wanted {hash}"),
    "other windows": (lambda: draw_windows(seed=1), "calibration: found {hash}, wanted {hash}"),
    "other statistics": (change_kind, "statistics: found gram, wanted norms"),
    "none": (lambda: observed("prune.statistics=none"), "statistics: found none, wanted norms; base: found None, wanted {hash}; .*"),
    "a damaged manifest": (lambda: write_json(STATISTICS / KEPT_MANIFEST, []), "statistics: found None, wanted norms; .*"),
}


@pytest.mark.parametrize("change", STALE)
def test_statistics_of_something_else_are_refused_by_name_before_a_weight_is_read(project, monkeypatch, change):
    observed(NORMS)
    apply, message = STALE[change]
    apply()
    monkeypatch.setattr(Checkpoint, "tensor", None)
    wanted = message.replace("{hash}", r"\w{64}")
    again = r"run the observe stage again \(python -m stages.observe\)"
    with pytest.raises(SparsesweepError, match=rf"manifest.json: these statistics were kept of something else \({wanted}\); {again}"):
        pruned(NORMS)


def test_statistics_by_other_code_tokens_dtype_or_batch_are_refused(project, monkeypatch):
    observed(NORMS)
    for override, message in {
        "prune.error_tokens=61": "error_tokens: found 60, wanted 61",
        "prune.expert_tokens=1": "expert_tokens: found 64, wanted 1",
        "prune.micro_batch=1": "micro_batch: found 2, wanted 1",
        "prune.dtype=bfloat16": "dtype: found float32, wanted bfloat16",
    }.items():
        with pytest.raises(SparsesweepError, match=rf"kept of something else \({message}\)"):
            pruned(NORMS, override)
    pruned(NORMS, "prune.memory_budget=4", "method=ria", "pattern.sparsity=0.3")
    assert was_read() == "norms"
    monkeypatch.setattr(kept.record, "code_sha256", lambda *_: "0" * 64)
    with pytest.raises(SparsesweepError, match=r"kept of something else \(code: found \w{64}, wanted 0{64}\)"):
        pruned(NORMS)


def test_without_statistics_the_stage_that_writes_them_is_named(project):
    with pytest.raises(SparsesweepError, match="artifacts/statistics/manifest.json: not found; has the stage that writes it run?"):
        pruned(NORMS)


def test_a_block_that_is_missing_cut_short_or_of_other_statistics_is_named(project):
    observed(NORMS)
    path = STATISTICS / "block-00001.safetensors"
    whole = path.read_bytes()
    for content in (whole[:-1], b"", whole[:100]):
        path.write_bytes(content)
        with pytest.raises(SparsesweepError, match="block-00001.safetensors: not found or damaged .*; run the observe stage again"):
            pruned(NORMS)
    path.unlink()
    with pytest.raises(SparsesweepError, match="block-00001.safetensors: not found or damaged .*; run the observe stage again"):
        pruned(NORMS)
    path.write_bytes(whole)
    draw_windows(seed=1)
    observed(NORMS)
    path.write_bytes(whole)
    with pytest.raises(SparsesweepError, match=r"block-00001.safetensors: these statistics were kept of something else \(calibration: "):
        pruned(NORMS)


def test_experts_that_are_loaded_one_at_a_time_are_not_kept_and_pruned_for_the_windows(tmp_path, monkeypatch, caplog):
    monkeypatch.chdir(tmp_path)
    project_of("mixtral", tmp_path)
    little = "prune.memory_budget=0.0001"
    with pytest.raises(ConfigError, match="prune.statistics: found 'norms', wanted none: blocks with all of their experts need up to "):
        observed(NORMS, little)
    assert not STATISTICS.exists()
    observed(NORMS)
    expected = pruned(little)
    assert pruned(NORMS, little) == expected
    assert was_read() is None
    assert "is of no use, since experts are loaded one at a time" in caplog.text


# What is written.


def test_the_same_windows_leave_the_same_bytes(project):
    assert observed(GRAM) == observed(GRAM)


def test_a_block_has_one_statistic_for_all_layers_that_read_one_tensor(project):
    observed(NORMS)
    decoder = Decoder(Checkpoint(BASE), torch.float32, torch.device("cpu"))
    facts = kept.fingerprint(
        section(NORMS),
        decoder.checkpoint,
        read_json(STATISTICS / KEPT_MANIFEST)["calibration"],
        batch=2,
        device=decoder.device,
        dtype=torch.float32,
    )
    inputs, held_out = kept.KeptInputs(STATISTICS, decoder, kept.SquaredNorm, facts).of_block(0)
    names = [[layer.module.rpartition(".")[2] for layer in one.layers] for one in inputs]
    assert sorted(map(sorted, names)) == [["down_proj"], ["gate_proj", "up_proj"], ["k_proj", "q_proj", "v_proj"], ["o_proj"]]
    assert all(one.tokens == 5 * 24 and one.statistic.windows == 5 for one in inputs)
    assert [len(held_out[one.layers[0]]) for one in inputs] == [48] * 4


def test_by_default_nothing_is_kept_and_transformers_is_not_imported(tmp_path):
    script = (
        "import sys; from stages import observe; from stages.config.compose import read\n"
        "observe.main.function(prune=read()['prune']); print('transformers' in sys.modules)"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
    files = {path.name: path.read_text() for path in (tmp_path / STATISTICS).iterdir()}
    assert files == {"manifest.json": '{\n "statistics": "none"\n}\n'}


def test_the_fingerprint_has_the_code_that_the_stage_runs():
    """Else edited code would leave statistics that are refused, or old ones that are taken."""
    packages = ("checkpoint", "pruning", "streaming")
    names = {str(path.relative_to(ROOT / "stages")) for path in code_of("python -m stages.observe")}
    assert set(kept.CODE) == {name for name in names if name.startswith(packages) or name == "observe.py"}
    assert not any(name.startswith(("pruning/scores", "pruning/updates", "pruning/patterns")) for name in names)


def test_an_error_leaves_what_was_there(project, monkeypatch):
    before = observed(NORMS)
    draw_windows(seed=1)
    monkeypatch.setattr(kept, "write_json", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        observed(NORMS)
    assert {path.name: path.read_bytes() for path in STATISTICS.iterdir()} == before


def killed_at_the_second_block(directory: Path) -> None:
    """In a child process."""
    torch.set_num_threads(1)
    os.chdir(directory)
    write = kept.write_block

    def killed(path: Path, index: int, *arguments: object) -> None:
        write(path, index, *arguments)
        if index == 1:
            os.kill(os.getpid(), signal.SIGKILL)

    kept.write_block = killed
    observed(NORMS)


def test_what_a_killed_run_wrote_is_not_taken_for_whole(project):
    child = forks().Process(target=killed_at_the_second_block, args=(project,))
    child.start()
    child.join(300)
    assert child.exitcode == -signal.SIGKILL
    assert not STATISTICS.exists()
    with pytest.raises(SparsesweepError, match="manifest.json: not found"):
        pruned(NORMS)
    expected = pruned()
    observed(NORMS)
    assert {path.name for path in Path("artifacts").iterdir() if "statistics" in path.name} == {"statistics"}
    assert pruned(NORMS) == expected
