import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from stages.checkpoint.delta import Change
from stages.checkpoint.reader import Checkpoint
from stages.errors import SparsesweepError
from stages.release.__main__ import main
from stages.release.packed import pack_release
from stages.release.packing import pack, write_sums
from stages.release.zeros import MANIFEST, compare, read_zeros, write_zeros
from tests import deltas
from tests.project import ROOT

UP = "model.layers.0.mlp.up_proj.weight"


@pytest.fixture()
def release(base, tmp_path):
    """Half of every matrix is zero."""
    generator = torch.Generator().manual_seed(0)
    changes = {name: Change(mask=torch.rand(base.shape(name), generator=generator) > 0.5) for name in deltas.matrices(base)}
    rows = [deltas.row(name, change.mask) for name, change in changes.items()]
    delta = deltas.write(tmp_path / "delta", deltas.recipe(base=base.fingerprint), changes, rows)
    (tmp_path / "release").mkdir()
    pack(base, delta, tmp_path / "release")
    write_zeros(tmp_path / "release", delta)
    write_sums(tmp_path / "release")
    return tmp_path / "release"


@pytest.fixture()
def trained(release, tmp_path):
    """The release with three zeros of a matrix lost, in one shard of float32, and a directory beside it."""
    tensors = {name: Checkpoint(release).tensor(name).float() for name in Checkpoint(release)}
    lost = (tensors[UP] == 0).nonzero()[:3]
    tensors[UP][lost[:, 0], lost[:, 1]] = 0.5
    (tmp_path / "trained/checkpoint-1").mkdir(parents=True)
    save_file(tensors, tmp_path / "trained/model.safetensors", metadata={"format": "pt"})
    (tmp_path / "trained/checkpoint-1/model.safetensors").write_bytes(b"older")
    (tmp_path / "trained/config.json").write_text("{}")
    return tmp_path / "trained"


def test_the_manifest_states_pattern_and_zeros(release, base):
    stated, written = read_zeros(release), Checkpoint(release)
    assert (stated.pattern, stated.comparison_group, stated.allocation) == ({"name": "unstructured", "sparsity": 0.5}, "row", "uniform")
    assert set(stated.tensors) == set(deltas.matrices(base))
    assert stated.tensors[UP].zeros == int((written.tensor(UP) == 0).sum())
    assert stated.sparsity == stated.zeros / stated.weights


def test_a_release_has_the_zeros_that_it_states(release, capsys):
    main(["check", str(release)])
    total = read_zeros(release).zeros
    assert f"{total} of {total} zeros in 21 tensors are there, 0 more" in capsys.readouterr().out


def test_what_training_lost_is_named(release, trained, capsys):
    with pytest.raises(SystemExit, match="found 3 zeros lost, and 0 tensors with as many zeros elsewhere, wanted none"):
        main(["check", str(trained), "--against", str(release)])
    assert re.search(rf"^{UP}: 3 of \d+ zeros lost, 0 more$", capsys.readouterr().out, re.M)


@pytest.mark.parametrize("out", [None, "restored"])
def test_the_zeros_are_put_back_and_nothing_else_changes(release, trained, tmp_path, out, capsys):
    before, target = load_file(trained / "model.safetensors"), tmp_path / (out or "trained")
    main(["check", str(trained), "--against", str(release), "--apply", *(["--out", str(target)] if out else [])])
    after, lost = load_file(target / "model.safetensors"), 0
    for name, tensor in before.items():
        changed = after[name] != tensor
        assert not changed.any() or (name == UP and (after[name][changed] == 0).all())
        lost += int(changed.sum())
    assert lost == 3
    assert (target / "checkpoint-1/model.safetensors").read_bytes() == b"older"
    main(["check", str(target), "--against", str(release)])


def test_zeros_elsewhere_are_seen_without_the_release(release, tmp_path):
    shutil.copytree(release, tmp_path / "other")
    for shard in (tmp_path / "other").glob("*.safetensors"):
        tensors = {name: tensor.flip(0) if name == UP else tensor for name, tensor in load_file(shard).items()}
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, shard, metadata={"format": "pt"})
    with pytest.raises(SystemExit, match="found 0 zeros lost, and 1 tensors with as many zeros elsewhere"):
        main(["check", str(tmp_path / "other")])


def test_an_interrupted_write_leaves_the_checkpoint_as_it_was(release, trained, monkeypatch):
    before = (trained / "model.safetensors").read_bytes()

    def fail(*_) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("stages.release.zeros.write_shard", fail)
    with pytest.raises(SystemExit, match="the disk is full"):
        main(["check", str(trained), "--against", str(release), "--apply"])
    assert (trained / "model.safetensors").read_bytes() == before
    assert not list(trained.parent.glob(".trained*"))


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda release, trained: (release / MANIFEST).unlink(), "found no sparsity.json, wanted a release"),
        (lambda release, trained: (release / MANIFEST).write_text('{"format": 1}'), "sparsity.json: found the format 1, wanted"),
        (lambda release, trained: (trained / "model.safetensors").unlink(), "trained: no model.safetensors.index.json and no model.safete"),
        (
            lambda release, trained: save_file({"a": torch.zeros(1)}, trained / "model.safetensors"),
            "found no tensor model.layers.* wanted all that the release has zeros in; is it an adapter that was not merged",
        ),
        (
            lambda release, trained: save_file(
                {**load_file(trained / "model.safetensors"), UP: torch.zeros(2, 2)}, trained / "model.safetensors"
            ),
            r"up_proj.weight: found shape \[2, 2\], wanted \[112, 32\]",
        ),
        (
            lambda release, trained: (release / MANIFEST).write_text(
                (release / MANIFEST).read_text().replace(read_zeros(release).tensors[UP].mask_sha256, "0" * 64)
            ),
            "up_proj.weight: its zeros are not those of sparsity.json; was the release changed",
        ),
    ],
)
def test_what_cannot_be_compared_is_refused(release, trained, damage, message):
    damage(release, trained)
    with pytest.raises(SparsesweepError, match=message):
        list(compare(trained, release))


@pytest.mark.parametrize("apply", [False, True])
def test_a_packed_release_is_to_be_unpacked_first(release, trained, apply):
    pack_release(release, None)
    message = (
        f"error: {release}: found a packed release, wanted a plain checkpoint, which `python -m stages.release unpack {release} --out DIR`"
    )
    with pytest.raises(SystemExit, match=message):
        main(["check", str(trained), "--against", str(release), *["--apply"] * apply])
    with pytest.raises(SystemExit, match=message):
        main(["check", str(release)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--apply"], "--apply: found no --against, wanted the release whose zeros are set again"),
        (["--out", "x"], "--out: found it without --apply, wanted both or neither"),
    ],
)
def test_options_that_do_not_go_together_are_refused(trained, arguments, message):
    with pytest.raises(SystemExit, match=f"error: {message}"):
        main(["check", str(trained), *arguments])


# Training, as docs/finetuning.md shows it.

TEXT = (ROOT / "docs/finetuning.md").read_text()


@pytest.fixture()
def shown():
    """What the blocks of the page define."""
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", TEXT, re.S):
        exec(block, names)
    return names


def train(model, directory: Path, callbacks=()) -> None:
    """Two steps of transformers' Trainer with AdamW."""
    from transformers import Trainer, TrainingArguments

    tokens = torch.randint(3, 400, (8, 16), generator=torch.Generator().manual_seed(0))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    arguments = TrainingArguments(
        output_dir=str(directory),
        max_steps=2,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        weight_decay=0.1,
        report_to=[],
        use_cpu=True,
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    Trainer(model=model, args=arguments, train_dataset=rows, callbacks=list(callbacks)).train()


def loaded(release):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(release, dtype=torch.float32, local_files_only=True)


def test_full_fine_tuning_keeps_every_zero_and_without_the_callback_it_does_not(release, tmp_path, shown, capsys):
    model = loaded(release)
    train(model, tmp_path / "run", [shown["KeepZeros"](shown["zeros_of"](release, model))])
    model.save_pretrained(tmp_path / "trained")
    main(["check", str(tmp_path / "trained"), "--against", str(release)])
    total = read_zeros(release).zeros
    assert f"{total} of {total} zeros in 21 tensors are there, 0 more" in capsys.readouterr().out
    assert not torch.equal(Checkpoint(tmp_path / "trained").tensor(UP), Checkpoint(release).tensor(UP).float())
    model = loaded(release)
    train(model, tmp_path / "run")
    model.save_pretrained(tmp_path / "without")
    with pytest.raises(SystemExit, match="zeros lost"):
        main(["check", str(tmp_path / "without"), "--against", str(release)])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # which peft asks for
def test_an_adapter_merged_through_the_masks_leaves_every_zero(release, tmp_path, shown, capsys):
    peft = pytest.importorskip("peft")
    model = loaded(release)
    zeros = shown["zeros_of"](release, model)
    lora = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    adapted = peft.get_peft_model(model, lora)
    train(adapted, tmp_path / "run")
    merged = shown["merged_through"](zeros, adapted)
    merged.save_pretrained(tmp_path / "merged")
    main(["check", str(tmp_path / "merged"), "--against", str(release)])
    total = read_zeros(release).zeros
    assert f"{total} of {total} zeros in 21 tensors are there, 0 more" in capsys.readouterr().out
    assert not torch.equal(Checkpoint(tmp_path / "merged").tensor(UP), Checkpoint(release).tensor(UP).float())
