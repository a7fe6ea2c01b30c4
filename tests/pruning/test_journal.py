"""Kill -9 at any moment, run again: the bytes are those of a run that nobody interrupted."""

import os
import pkgutil
import random
import shutil
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks.memory import write_windows
from stages import prune
from stages.config.compose import read
from stages.errors import CalibrationError, SparsesweepError
from stages.files import CALIBRATION, PRUNE_JOURNAL, PRUNE_RESULTS, SPARSE, read_json, write_json
from stages.pruning import journal as journals
from stages.pruning.patterns import NmSection, UnstructuredSection
from stages.pruning.reconstructions.block import BlockSection
from stages.pruning.reconstructions.distilled import DistilledSection
from tests.methods import made
from tests.processes import forks

METHOD = made("obs", "sparsegpt", comparison_group="matrix", block_size=16)
PATTERN = UnstructuredSection(name="unstructured", sparsity=0.5)
DEFAULTS = read()
PRUNE = replace(DEFAULTS["prune"], device="cpu", dtype="float32", micro_batch=2, error_tokens=60, expert_tokens=0)
SEQUENTIAL = replace(PRUNE, propagate="sequential")
DISTILLED = DistilledSection(
    name="distilled", share=0.5, epochs=1, learning_rate=1e-3, block_epochs=1, block_learning_rate=1e-3, search=True
)


def draw_windows(seed: int = 0) -> None:
    write_windows(Path(), torch.randint(3, 400, (5, 24), generator=torch.Generator().manual_seed(seed)))


@pytest.fixture()
def project(canonical, tmp_path, monkeypatch) -> Path:
    """A directory in which the prune stage can run."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(canonical, "artifacts/base")
    draw_windows()
    return tmp_path


def run(**changes: object) -> dict[str, bytes]:
    """Run the stage; everything that a later stage reads, file by file."""
    sections = {"method": METHOD, "pattern": PATTERN, "prune": PRUNE, **changes}
    prune.main.function(
        **{name: sections.get(name, DEFAULTS[name]) for name in ("method", "pattern", "allocation", "reconstruction", "prune")}
    )
    return {path.name: path.read_bytes() for path in [*SPARSE.iterdir(), PRUNE_RESULTS / "sparsity.json"]}


def resumed_after() -> int:
    return read_json(PRUNE_RESULTS / "provenance.json")["resumed_after"]


LONGEST = 300  # seconds that a run of a second may take


def killed_while(prepare: Callable[[], object], **changes: object) -> bool:
    """Run the stage in a child process that `prepare` arranges to be killed; whether it was, or had finished before."""
    child = forks().Process(target=prepared_run, args=(Path.cwd(), prepare, changes))
    child.start()
    child.join(LONGEST)
    if child.exitcode is None:
        child.kill()
        pytest.fail(f"the run was neither killed nor done after {LONGEST} s")
    assert child.exitcode in (0, -signal.SIGKILL)
    return child.exitcode != 0


def prepared_run(directory: Path, prepare: Callable[[], object], changes: dict[str, object]) -> None:
    torch.set_num_threads(1)
    os.fsync = lambda _: None  # see conftest
    os.chdir(directory)
    prepare()
    run(**changes)


def kill(*_: object, **__: object) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@dataclass(frozen=True)
class AtCall:
    """Kill before or after the nth call of a function, which is named as pkgutil.resolve_name does."""

    owner: str
    name: str
    number: int
    before: bool

    def __call__(self) -> None:
        owner, calls = pkgutil.resolve_name(self.owner), []
        original = getattr(owner, self.name)

        def counted(*arguments, **keywords):
            calls.append(1)
            if self.before and len(calls) == self.number:
                kill()
            result = original(*arguments, **keywords)
            if len(calls) == self.number:
                kill()
            return result

        setattr(owner, self.name, counted)


@dataclass(frozen=True)
class After:
    """Kill after some seconds."""

    seconds: float

    def __call__(self) -> None:
        timer = threading.Timer(self.seconds, kill)
        timer.daemon = True  # a run that is done first ends
        timer.start()


PRUNE_STAGE, JOURNAL = "stages.prune", "stages.pruning.journal"
# where, and how many blocks must have been finished by then (None: an earlier moment may already count the next)
MOMENTS = {
    "before the first block": (AtCall(PRUNE_STAGE, "prune_blocks", 1, True), 0),
    "while the first delta file is written": (AtCall(JOURNAL, "write_block", 1, False), 0),
    "before the first record is in place": (AtCall(JOURNAL, "sha256", 1, False), 0),
    "after the second block": (AtCall(f"{JOURNAL}:Journal", "write", 2, False), 2),
    "while the third delta file is written": (AtCall(JOURNAL, "write_block", 3, False), 2),
    "before the results are written": (AtCall(PRUNE_STAGE, "write_results", 1, True), 3),
    "while the delta files are exported": (AtCall(f"{JOURNAL}:os", "link", 2, False), 3),
    "while the results are written": (AtCall(PRUNE_STAGE, "write_manifest", 1, False), 3),
    "before the journal is removed": (AtCall(PRUNE_STAGE, "write_results", 1, False), 3),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_after_its_last_finished_block_with_the_same_bytes(project, moment):
    expected = run()
    assert not PRUNE_JOURNAL.exists()
    shutil.rmtree(SPARSE), shutil.rmtree(PRUNE_RESULTS)  # as DVC does before it runs a stage
    prepare, finished = MOMENTS[moment]
    assert killed_while(prepare)
    assert run() == expected
    assert resumed_after() == finished
    assert not PRUNE_JOURNAL.exists()
    assert {path.name for path in Path("artifacts").iterdir()} == {"base", "calibration", "sparse"}


@pytest.mark.parametrize("seed", range(5))
def test_a_run_that_is_killed_again_and_again_at_random_moments_arrives_with_the_same_bytes(project, seed):
    started = time.perf_counter()
    expected = run()
    seconds, draw, kills = time.perf_counter() - started, random.Random(seed), 0
    while kills < 3:
        delay = seconds * draw.random()
        killed = killed_while(After(delay))
        kills += killed
        seconds *= 1 if killed else 0.7  # a warm run is faster, and a resumed one is shorter
    assert run() == expected


@pytest.mark.parametrize(
    "how",
    [
        {"prune": replace(PRUNE, propagate="dense")},
        {"reconstruction": BlockSection(name="block", epochs=1, learning_rate=1e-3, search=True)},
        {"reconstruction": DISTILLED},
        {"prune": SEQUENTIAL},
        {"prune": SEQUENTIAL, "reconstruction": BlockSection(name="block", epochs=1, learning_rate=1e-3, search=True)},
        {"prune": SEQUENTIAL, "pattern": NmSection(name="nm", kept=2, group=4, permutation_rounds=2)},
    ],
    ids=["dense propagation", "reconstructed", "distilled", "sequential", "sequential, reconstructed", "sequential, permuted"],
)
def test_a_run_resumes_whatever_the_blocks_are_pruned_for(project, how):
    expected = run(**how)
    interrupted(**how)
    assert run(**how) == expected
    assert resumed_after() == 2


@pytest.mark.parametrize(
    "moment",
    [AtCall(PRUNE_STAGE, "distill", 1, True), AtCall(PRUNE_STAGE, "distill", 1, False), AtCall(PRUNE_STAGE, "write_block", 2, False)],
    ids=["before it", "after it", "while its outcome is written"],
)
def test_a_run_that_is_killed_around_a_distillation_makes_it_again_with_the_same_bytes(project, moment):
    expected = run(reconstruction=DISTILLED)
    divergences = read_json(PRUNE_RESULTS / "provenance.json")["divergences"]
    assert 1 <= len(divergences) <= 5
    assert killed_while(moment, reconstruction=DISTILLED)
    assert run(reconstruction=DISTILLED) == expected
    assert resumed_after() == 3
    assert read_json(PRUNE_RESULTS / "provenance.json")["divergences"] == divergences


def interrupted(**changes: object) -> None:
    assert killed_while(AtCall(f"{JOURNAL}:Journal", "write", 2, False), **changes)
    assert PRUNE_JOURNAL.exists()


def test_a_files_bytes_are_on_the_disk_before_it_gets_its_name(project, monkeypatch):
    synced, renamed, replace_file = [], [], Path.replace

    def replaced(path: Path, target: Path) -> Path:
        if path.parent == PRUNE_JOURNAL and target.name.startswith("block-"):
            assert path.stat().st_ino in synced
            renamed.append(target)
        return replace_file(path, target)

    monkeypatch.setattr(journals.os, "fsync", lambda file: synced.append(os.fstat(file).st_ino))
    monkeypatch.setattr(Path, "replace", replaced)
    run()
    assert len(renamed) == 6  # a delta file and a record of each of three blocks


def test_another_base_starts_afresh(project, caplog):
    interrupted()
    name = next(Path("artifacts/base").glob("*.safetensors")).name
    provenance = read_json(Path("artifacts/base/provenance.json"))
    provenance["files"][name] = "0" * 64
    write_json(Path("artifacts/base/provenance.json"), provenance)
    with caplog.at_level("INFO"):
        run()
    assert resumed_after() == 0
    assert "an interrupted run of something else (base differ" in caplog.text


def test_another_config_json_starts_afresh(project):
    interrupted()
    facts = read_json(Path("artifacts/base/config.json"))
    write_json(Path("artifacts/base/config.json"), {**facts, "rms_norm_eps": 0.1})
    found = run()
    assert resumed_after() == 0
    assert found == run()


def test_more_memory_goes_on_where_less_was_too_little(project):
    expected = run()
    interrupted()
    resumed = run(prune=replace(PRUNE, memory_budget=0.0001))
    assert resumed == expected
    assert resumed_after() == 2
    assert read_json(PRUNE_RESULTS / "provenance.json")["hidden_states"].startswith("a file of")


def test_other_windows_start_afresh(project):
    interrupted()
    draw_windows(seed=1)
    found = run()
    assert resumed_after() == 0
    assert found == run()


def test_windows_that_are_not_those_drawn_are_refused_before_a_block_is_read(project, monkeypatch):
    monkeypatch.setattr(prune, "Decoder", None)
    path = CALIBRATION / "windows.safetensors"
    drawn = path.read_bytes()
    path.write_bytes(drawn[:-8])
    with pytest.raises(CalibrationError, match=r"windows.safetensors: found \w{64}, wanted SHA-256 \w{64}; run the sample stage again"):
        run()
    path.unlink()
    with pytest.raises(CalibrationError, match="windows.safetensors: found no file, wanted SHA-256"):
        run()
    path.write_bytes(drawn)
    facts = read_json(CALIBRATION / "provenance.json")
    write_json(CALIBRATION / "provenance.json", {"windows_sha256": facts["windows_sha256"]})
    with pytest.raises(CalibrationError, match="provenance.json: found no tokenizer_sha256; run the sample stage again"):
        run()
    write_json(CALIBRATION / "provenance.json", facts | {"tokenizer_sha256": "0" * 64})
    with pytest.raises(CalibrationError, match="found windows of the tokenizer with SHA-256 0{64}, wanted that of artifacts/base, "):
        run()


def test_another_configuration_starts_afresh(project):
    interrupted()
    run(pattern=UnstructuredSection(name="unstructured", sparsity=0.25))
    assert resumed_after() == 0


def test_other_code_starts_afresh(project, monkeypatch):
    interrupted()
    monkeypatch.setattr(prune, "code_sha256", lambda: "0" * 64)
    run()
    assert resumed_after() == 0


def test_a_block_whose_bytes_changed_since_is_pruned_again(project):
    expected = run()
    interrupted()
    path = PRUNE_JOURNAL / "block-00001.safetensors"
    damaged = bytearray(path.read_bytes())
    damaged[-1] ^= 1
    path.write_bytes(damaged)
    assert run() == expected
    assert resumed_after() == 1


def test_a_full_disk_stops_with_a_clear_error_and_keeps_the_blocks_finished(project, monkeypatch):
    expected = run()
    write, calls = journals.write_block, []

    def full(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        write(*arguments)

    monkeypatch.setattr(journals, "write_block", full)
    with pytest.raises(SparsesweepError, match=r"artifacts/.prune: the disk is full .*; the blocks finished so far are kept"):
        run()
    monkeypatch.undo()
    os.chdir(project)
    assert run() == expected
    assert resumed_after() == 2


NO_BASE = None  # for journals of which no block is read or written


def test_two_runs_in_one_place_are_refused(project):
    facts = {"base": "b"}
    with (
        journals.opened(PRUNE_JOURNAL, facts, NO_BASE),
        pytest.raises(SparsesweepError, match=r"artifacts/.prune: another run is pruning here"),
        journals.opened(PRUNE_JOURNAL, facts, NO_BASE),
    ):
        pass


def kept(directory: Path, files: dict[str, bytes]) -> None:
    """A journal with the fingerprint {"a": 1} and some files."""
    directory.mkdir()
    (directory / journals.FINGERPRINT).write_text(journals._text({"a": 1}))
    for name, content in files.items():
        (directory / name).write_bytes(content)


@pytest.mark.parametrize("record", [b"[]", b"{}", b"{", b'{"sha256": "0"}', b'{"sha256": "0", "seconds": "x"}'])
def test_a_block_with_a_damaged_record_is_pruned_again(tmp_path, record):
    kept(tmp_path / "journal", {"block-00000.json": record, "block-00000.safetensors": b""})
    with journals.opened(tmp_path / "journal", {"a": 1}, NO_BASE) as journal:
        assert (journal.finished, journal.seconds_before) == (0, 0.0)


def test_damaged_evidence_is_named(tmp_path):
    kept(tmp_path / "journal", {journals.EVIDENCE: b"no tensors"})
    wanted = "evidence.safetensors: damaged .*; remove .*journal and run again"
    with pytest.raises(SparsesweepError, match=wanted), journals.opened(tmp_path / "journal", {"a": 1}, NO_BASE) as journal:
        journal.allocation_evidence(dict)


@pytest.mark.parametrize("fingerprint", [b"\xff", b"[]", b"{"])
def test_a_damaged_fingerprint_begins_afresh(tmp_path, fingerprint):
    kept(tmp_path / "journal", {journals.FINGERPRINT: fingerprint, "block-00000.json": b"{}"})
    with journals.opened(tmp_path / "journal", {"a": 1}, NO_BASE) as journal:
        assert not journal.record_path(0).exists()
