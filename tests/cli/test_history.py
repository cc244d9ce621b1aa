"""`minilora history` and `minilora rollback`, and the receipts that `minilora inspect` shows."""

import json
import re
import shlex
import shutil
from dataclasses import replace

import pytest
from safetensors.numpy import load_file, save_file
from strategies import receipt_fields, trained_adapter

from minilora import load_adapter, load_model, save_adapter
from minilora.cli import history
from minilora.disk import folder as folder_module
from minilora.disk.folder import NAMES
from minilora.disk.peft import digest_of
from minilora.disk.receipt import RECEIPT, read_receipt, sha256_of
from minilora.disk.versions import Version, keep, kept_versions
from minilora.training.checkpoint import REMOVED

TENSORS = "adapter_model.safetensors"
FINGERPRINT = "0123456789abcdef"


@pytest.fixture(scope="module")
def base(folder):
    return load_model(folder / "base")


def save(base, folder, seed, **changes):
    """The adapter of a seed, with a receipt of that day of December."""
    fields = receipt_fields(f"2026-12-{seed:02}T01:02:03.456Z", steps=seed, **changes)
    save_adapter(trained_adapter(base, seed), folder, receipt=fields)


@pytest.fixture
def kept(base, tmp_path):
    """The folder of an adapter of the third, which keeps those of the first and the second."""
    for seed in (1, 2, 3):
        if seed > 1:
            keep(tmp_path / "a")
        save(base, tmp_path / "a", seed)
    return tmp_path / "a"


def lines_of(out):
    """(the bases, the cells of each adapter's line) of a list; its cells have no two spaces in them."""
    lines = out.splitlines()
    rows = [re.split(" {2,}", line.strip()) for line in lines if line.startswith("  2")]
    return [line for line in lines if not line.startswith(" ")], rows


def test_a_rollback_that_was_killed_at_its_end_is_ended_by_the_same_command(run, kept, monkeypatch):
    to = kept_versions(kept)[0].digest
    with monkeypatch.context() as patch:
        patch.setattr(folder_module, "end_save", lambda folder: None)
        run("rollback", kept, "--to", to)
    assert (kept / NAMES).exists()
    code, _, err = run("rollback", kept, "--to", to)
    assert code == 1 and "is the one in use" in err
    assert not [path for path in kept.iterdir() if path.name.startswith(".")]


def test_where_nothing_is_older_the_flag_that_names_another_is_told(run, kept):
    for _ in range(2):
        assert run("rollback", kept)[0] == 0
    code, _, err = run("rollback", kept)
    assert code == 1 and "no version is older than the one in use" in err and err.endswith(": name one with --to\n")


def test_a_rollback_removes_what_is_left_of_a_checkpoint(run, kept):
    (kept / REMOVED).mkdir()
    (kept / REMOVED / "checkpoint.safetensors").write_bytes(b"half")
    assert run("rollback", kept)[0] == 0
    assert not (kept / REMOVED).exists()


def test_adapters_and_their_versions_are_listed_by_date_with_what_their_receipts_say(run, kept):
    code, out, err = run("history", kept)
    bases, rows = lines_of(out)
    assert (code, err) == (0, "") and bases == [f"base b, fingerprint {FINGERPRINT}"]
    places = [version.folder for version in kept_versions(kept)]
    same = ["3.2500", "3.5000", "notes.txt abababab"]
    for day, place in enumerate([*places, kept], 1):
        digits = sha256_of(place / TENSORS)[:8]
        assert rows[day - 1] == [f"2026-12-{day:02} 01:02:03", str(day), *same, digits, str(place)]
    assert len(rows) == 3
    assert out.splitlines()[1].split() == "date (UTC) steps last loss held out data tensors adapter".split()


def test_adapters_below_a_folder_are_grouped_by_their_bases(run, base, kept, tmp_path, folder):
    fields = receipt_fields(base={"name": "other", "fingerprint": "f" * 16})
    fields["run"]["losses"]["held_out_after"] = None
    save_adapter(trained_adapter(base, 4), tmp_path / "deep" / "down" / "b", receipt=fields)
    shutil.copytree(folder / "one", tmp_path / "one")
    (tmp_path / ".hidden").mkdir()
    save(base, tmp_path / ".hidden" / "c", 5)
    code, out, err = run("history", tmp_path)
    bases, rows = lines_of(out)
    assert (code, err) == (0, "") and len(rows) == 5 and len(bases) == 3
    assert f"base b, fingerprint {FINGERPRINT}" in bases and f"base other, fingerprint {'f' * 16}" in bases
    [one] = [row for row in rows if row[-1] == str(tmp_path / "one")]
    assert one[1:5] == ["-", "-", "-", "no receipt"]
    assert any(line.startswith(f"base {folder / 'base'}, fingerprint ") for line in bases), "that its tensors note"
    [down] = [row for row in rows if row[-1].endswith("b")]
    assert down[1:4] == ["4", "3.2500", "-"]


def test_a_folder_given_twice_is_listed_once(run, kept, tmp_path):
    assert len(lines_of(run("history", kept, tmp_path, kept / "versions" / "..")[1])[1]) == 3


def test_of_the_adapter_in_use_no_copy_is_listed(run, kept):
    keep(kept)
    assert len(kept_versions(kept)) == 3 and len(lines_of(run("history", kept)[1])[1]) == 3


def test_a_receipt_of_other_tensors_and_a_damaged_one_are_told(run, base, tmp_path):
    save(base, tmp_path / "a", 1)
    save(base, tmp_path / "b", 2)
    shutil.copy(tmp_path / "a" / RECEIPT, tmp_path / "b" / RECEIPT)
    save(base, tmp_path / "c", 3)
    (tmp_path / "c" / RECEIPT).write_text('{"receipt": 7}')
    code, out, err = run("history", tmp_path)
    rows = lines_of(out)[1]
    assert (code, err) == (0, "") and [row[4] for row in rows].count("a wrong receipt") == 2 and len(rows) == 3
    assert "b/receipt.json is the receipt of other tensors" in out and "c/receipt.json: receipt must be 1, got 7" in out
    for name, told in (("b", "is the receipt of other tensors"), ("c", "receipt must be 1, got 7")):
        code, out, err = run("inspect", tmp_path / name)
        assert (code, err) == (0, "") and told in " ".join(out.split())


def test_an_adapter_that_cannot_be_read_is_listed_all_the_same(run, base, tmp_path):
    for name, damage in (("a", b""), ("b", b"nonsense" * 9)):
        (tmp_path / name).mkdir()
        (tmp_path / name / TENSORS).write_bytes(damage)
        (tmp_path / name / "adapter_config.json").write_bytes(damage)
    code, out, err = run("history", tmp_path)
    assert (code, err) == (0, "") and len(lines_of(out)[1]) == 2 and "of another program, no fingerprint" in out


def hostile(value, text, number):
    """A value of a receipt with another text and another number in each place that may hold any."""
    if isinstance(value, dict):
        return {key: hostile(inner, text, number) for key, inner in value.items()}
    if isinstance(value, float):
        return number
    if isinstance(value, int):
        return 2**63 - 1
    if isinstance(value, str) and not re.fullmatch("[0-9a-f]{16,64}|2026-.*", value):
        return text
    return value


@pytest.mark.parametrize("text", ["a/b\nminilora: all is well", "\tx\r\u2028y", "w" * 4000, "p/" * 2000])
@pytest.mark.parametrize("number", [1e300, -0.0])
def test_a_receipt_adds_no_line_and_widens_none(run, base, kept, text, number):
    usual = [run(command, kept)[1].splitlines() for command in ("history", "inspect")]
    true = read_receipt(kept / RECEIPT)
    true.pop("receipt")
    receipt = {"receipt": 1, **hostile(true, text, number), "tensors": true["tensors"]}
    (kept / RECEIPT).write_text(json.dumps(receipt))
    code, out, err = run("history", kept)
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", len(usual[0]))
    assert max(map(len, lines)) < max(map(len, usual[0])) + 340 and len(lines_of(out)[1]) == 3
    assert len(lines[-1]) < len(usual[0][-1]) + history.LONGEST_NAME + 60
    code, out, err = run("inspect", kept)
    assert (code, err) == (0, "") and len(out) < sum(map(len, usual[1])) + 6000
    assert not any(line.strip().startswith("minilora: all") for line in out.splitlines())
    code, out, err = run("rollback", kept)
    assert (code, err, out.count("\n")) == (0, "", 3) and len(out) < 1500


@pytest.mark.parametrize("words", [["nowhere"], ["t.txt"], ["base"]])
def test_where_there_is_no_adapter_it_is_said(run, words):
    code, out, err = run("history", *words)
    assert (code, out) == (1, "") and err.count("\n") == 1 and ("no adapter" in err or "no folder" in err)


# Back.


def test_the_last_version_is_put_back_and_taken_back_again(run, base, kept):
    digests = [version.digest for version in kept_versions(kept)]
    newest = sha256_of(kept / TENSORS)
    code, out, err = run("rollback", kept)
    assert (code, err) == (0, "") and sha256_of(kept / TENSORS) == digests[1]
    first, second, third = out.splitlines()
    now = f"{digests[1][:8]}, 2026-12-02 01:02:03 UTC, 2 steps on notes.txt abababab, last loss 3.2500, held out 3.5000"
    assert first == f"{kept}: the adapter is now {now}"
    assert "is kept in" in second and newest[:8] in second and third.startswith("to take it back: minilora rollback")
    load_adapter(kept, base, receipt=kept / RECEIPT, say=lambda account: None)
    assert run(*third.partition("minilora ")[2].split())[0] == 0 and sha256_of(kept / TENSORS) == newest
    assert run("rollback", kept, "--to", kept_versions(kept)[0].folder / RECEIPT)[0] == 0
    assert sha256_of(kept / TENSORS) == digests[0] and len(kept_versions(kept)) == 3
    code, out, err = run("rollback", kept)
    assert (code, out) == (1, "") and "no version is older" in err and err.count("\n") == 1


@pytest.mark.parametrize("words, told", [
    (["nowhere"], "nowhere does not exist"), (["base"], "base holds a model, where an adapter is needed"),
    (["t.txt"], "t.txt is a file; give the folder"), (["."], "its sub-folders have: "), (["one"], "none is kept"),
    (["one", "--to", "xyz"], "no digest"), (["one", "--to", "abcdef"], "no version has the digest abcdef"),
])  # fmt: skip
def test_what_cannot_be_put_back_is_one_line(run, words, told):
    code, out, err = run("rollback", *words)
    assert (code, out) == (1, "") and told in err and err.count("\n") == 1


@pytest.mark.parametrize("damage", ["tensors", "metadata", "config"])
def test_no_command_takes_back_what_cannot_be_put_back(run, kept, damage):
    """A bit that flipped; tensors that another program wrote; a configuration that is none."""
    path = kept / TENSORS
    if damage == "tensors":
        path.write_bytes(path.read_bytes()[:-1] + bytes([path.read_bytes()[-1] ^ 1]))
    elif damage == "metadata":
        save_file(load_file(path), path)
    else:
        (kept / "adapter_config.json").write_text("{")
    digits = sha256_of(path)[:8]
    code, out, err = run("rollback", kept, "--to", kept_versions(kept)[0].digest)
    lines = out.splitlines()
    assert (code, err, len(lines)) == (0, "", 3) and lines[2].startswith("it cannot be put back: ")
    assert ("with a wrong receipt: " in lines[1]) == (damage != "config") and "without a receipt" not in out
    code, _, err = run("rollback", kept, "--to", digits)
    assert code == 1 and lines[2].partition(": ")[2] == err.partition(": ")[2].rstrip()


# What inspect shows.


def test_inspect_shows_the_receipt_and_obeys_nothing_in_it(run, base, tmp_path):
    settings = {"alpha": 16.0, "target": ["q_proj", "v_proj"], "rslora": True, "seed": 7}
    save(base, tmp_path / "a", 3, command="minilora finetune \x1b[31m" + "x" * 5000, parents=["cd" * 32],
         run=receipt_fields(steps=3)["run"] | {"settings": settings})
    code, out, err = run("inspect", tmp_path / "a")
    told = " ".join(out.split())
    assert (code, err) == (0, "") and "\x1b" not in out and "\\x1b[31m" in out and len(out) < 5000
    assert "receipt 2026-12-03 01:02:03 UTC: 3 steps in 0 s on d/notes.txt (abababab: 100 tokens); " in told
    losses = "loss 4.5000 -> 3.2500 nats per token (first and last step), held out 4.7500 -> 3.5000"
    assert f"{losses}, the best, after step 2; gone on from the tensors cdcdcdcd" in told
    assert "settings alpha=16.0, target=[\"q_proj\", \"v_proj\"], rslora=true, seed=7 made by" in told
    assert "made by minilora 0.6.0, NumPy 2.4.6, Python 3.11.1; a processor; a BLAS; numpy, 2 parts" in told


def test_a_run_of_one_step_is_told_in_the_singular():
    run = receipt_fields(steps=1)["run"] | {"parts": 1}
    receipt = {"receipt": 1, **receipt_fields(run=run), "tensors": {"file": TENSORS, "sha256": "ab" * 32}}
    text = " ".join(text for _, text in history.summary(receipt))
    version = Version(None, "ab" * 32, receipt["date"], receipt, None)
    assert " 1 step in 0 s on " in text and "; loss 3.2500 nats per token, " in text and ", 1 part" in text
    assert ", 1 step on notes.txt" in history.told(version)
    assert not re.search(r"\b1 (steps|parts)|first and last", text + history.told(version))


def test_a_run_of_the_program_leaves_a_receipt_with_its_command(run, tmp_path):
    words = ["finetune", "--base", "base", "--data", "q.jsonl", "--out", tmp_path / "my adapter", "--alpha", 4]
    words += ["--steps", 4, "--batch", 2, "--r", 2]
    assert run(*words)[::2] == (0, "")
    receipt = json.loads((tmp_path / "my adapter" / RECEIPT).read_text())
    assert receipt["command"] == shlex.join(["minilora", *map(str, words)])
    assert run(*words)[0] == 1
    assert run(*words, "--keep", 1)[0] == 0 and len(kept_versions(tmp_path / "my adapter")) == 1


def test_what_is_added_or_extracted_has_a_receipt_that_names_what_it_is_made_of(run, base, folder, tmp_path):
    words = ["combine", "--base", "base", "--adapter", "one", "two", "--weights", 1, -1, "--out", tmp_path / "sum"]
    assert run(*words)[0] == 0
    receipt = read_receipt(tmp_path / "sum" / RECEIPT)
    assert receipt["command"] == shlex.join(["minilora", *map(str, words)]) and receipt["run"] is None
    assert receipt["parents"] == [sha256_of(folder / name / TENSORS) for name in ("one", "two")]
    loaded = load_adapter(tmp_path / "sum", base, receipt=receipt, say=lambda account: None)
    assert receipt["updates"].keys() == loaded.pairs.keys()
    assert receipt["base"]["fingerprint"] == digest_of(base.fingerprint())
    assert run("extract", "--base", "base", "--tuned", "other", "--r", 1, "--out", tmp_path / "out")[0] == 0
    assert read_receipt(tmp_path / "out" / RECEIPT)["parents"] == []
    digits = [digest[:8] for digest in receipt["parents"]]
    rows = {row[-1]: row for row in lines_of(run("history", tmp_path)[1])[1]}
    assert rows[str(tmp_path / "sum")][1:5] == ["-", "-", "-", f"made of {', '.join(digits)}"]
    assert rows[str(tmp_path / "out")][1:5] == ["-", "-", "-", "-"]


def test_planted_a_list_that_takes_a_receipt_for_granted_is_seen(run, base, tmp_path, monkeypatch):
    true_version_in = history.version_in
    monkeypatch.setattr(history, "version_in", lambda folder: replace(true_version_in(folder), problem=None))
    with pytest.raises(AssertionError):
        test_a_receipt_of_other_tensors_and_a_damaged_one_are_told(run, base, tmp_path)
