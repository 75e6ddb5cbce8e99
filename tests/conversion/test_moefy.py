"""``convert moefy``, and what the commands make of its outputs."""

import json
import re
import shutil
import signal
import subprocess
import sys
import threading

import pytest
import torch
import toy_task
from converting import predictions
from omegaconf import OmegaConf
from toy_task import generate, interactive, run, train

from fairseq_smoe.__main__ import main
from fairseq_smoe.checkpoints import transform
from fairseq_smoe.checkpoints.description import describe
from fairseq_smoe.checkpoints.parts import read_checkpoint
from fairseq_smoe.conversion.moefy import samples, steps
from fairseq_smoe.errors import OptionError

P = 16  # small experts of 8 units


def convert(source, output, *words):
    """Convert in this process; returns the report."""
    words = ["--moefy-experts", P, *words]
    main(["convert", "moefy", str(source), str(output), *map(str, words)])
    return json.loads(output.with_suffix(".report.json").read_text())


def model_of(path):
    return torch.load(path, weights_only=False)["model"]


def same_models(one, other):
    one, other = model_of(one), model_of(other)
    return one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


def overrides(**options):
    return {"model_overrides": str(options)}


def same_translations(one, other, tolerance):
    """The sentences are equal, and their scores to a tolerance."""
    assert one.sentences.keys() == other.sentences.keys()
    for i, (score, sentence) in one.sentences.items():
        assert other.sentences[i] == (pytest.approx(score, abs=tolerance), sentence)


@pytest.fixture(scope="module")
def converted(make_once, trained):
    """``converted(name)``: a trained row of ``toy_task.MODELS``, of which a quarter is kept."""

    def converted(name):
        def make(folder):
            convert(trained(name), folder / "moefied.pt")

        return make_once(f"moefied-{name}", make) / "moefied.pt"

    return converted


def losses(data, path, **options):
    """Loss of each target token of the test set."""
    logits, targets = predictions(*toy_task.load(data, path, **options))
    return torch.nn.functional.cross_entropy(logits, targets, reduction="none")


# --------------------------------------------------------------------------------------
# what comes out


@pytest.mark.parametrize("name", ["dense", "vanilla", "smoe"])
def test_all_experts_kept_are_the_model(name, converted, trained, data):
    """Dense layers and, at a second level, the experts of expert layers."""
    before, after = trained(name), converted(name)
    for select in ("mlp", "oracle"):
        all_kept = losses(data, after, moefy_k=0, moefy_select=select)
        torch.testing.assert_close(all_kept, losses(data, before), rtol=0, atol=1e-5)
    assert (losses(data, after) - losses(data, before)).abs().max() > 1e-3
    translated = generate(data, after, **overrides(moefy_k=0))
    assert translated.bleu > 90
    same_translations(translated, generate(data, before), 1e-5)


@pytest.mark.parametrize("name, ffns", [("dense", 4), ("vanilla", 2 + 2 * 8)])
def test_report_and_inspection(name, ffns, converted):
    path = converted(name)
    report = json.loads(path.with_suffix(".report.json").read_text())
    assert (report["small_experts"], report["kept"], len(report["ffns"])) == (P, 4, ffns)
    names = [ffn["name"] for ffn in report["ffns"]]
    assert names[0] == "encoder.layers.0" and len(set(names)) == ffns
    for ffn in report["ffns"]:
        if not ffn["tokens"]:
            continue
        rows = ffn["coverage"]
        assert [row["kept"] for row in rows] == [2, 4, 8]
        for row in rows:
            assert row["kept"] / P < row["router"] <= row["oracle"] + 1e-6 <= 1 + 2e-6
    of = "every dense FFN" + (" and every expert" if name == "vanilla" else "")
    assert describe(path)["small experts"] == f"{P} of {of}, 25% kept (mlp)"
    assert not path.with_name(f"{path.name}.work").exists()


def test_dense_layers_see_every_token_once(converted, text):
    """In all directions, with a language token and an end for every sentence of either side."""
    report = json.loads(converted("dense").with_suffix(".report.json").read_text())
    tokens = {ffn["name"]: ffn["tokens"] for ffn in report["ffns"]}
    for side in ("encoder", "decoder"):
        expected = 0
        for direction in toy_task.DIRECTIONS:
            source, target = direction.split("-")
            other = ({source, target} - {"en"}).pop()
            lang = source if side == "encoder" else target
            lines = (text / f"valid.en-{other}.{lang}").read_text().splitlines()
            expected += sum(len(line.split()) + 2 for line in lines)
        assert {n for name, n in tokens.items() if name.startswith(side)} == {expected}, side


def test_other_ways(trained, data, tmp_path):
    """Fewer kept, other splits and ways of choosing; the oracle needs no router."""
    for split, select, k in (("graph", "similarity", "3"), ("random", "oracle", "50%")):
        output = tmp_path / f"{split}.pt"
        words = ("--moefy-split", split, "--moefy-select", select, "--moefy-k", k)
        report = convert(trained("dense"), output, *words, "--layers", "dense")
        assert report["kept"] == int(k.removesuffix("0%")) + (3 if "%" in k else 0)
        routers = [name for name in model_of(output) if "router" in name]
        assert len(routers) == (4 if select == "similarity" else 0)
        all_kept = losses(data, output, moefy_k="100%")
        torch.testing.assert_close(all_kept, losses(data, trained("dense")), rtol=0, atol=1e-5)


def test_one_level_alone(trained, data, tmp_path):
    for level, fewer in (("dense", "fc1.experts"), ("experts", "expert_block.experts")):
        output = tmp_path / f"{level}.pt"
        convert(trained("smoe"), output, "--layers", level, "--moefy-split", "random")
        split = {name for name in model_of(output) if name.endswith("router_in")}
        assert len(split) == 2 and all(fewer in name for name in split)
        all_kept = losses(data, output, moefy_k=0)
        torch.testing.assert_close(all_kept, losses(data, trained("smoe")), rtol=0, atol=1e-5)


def test_fewer_experts_are_further_from_the_model(converted, trained, data):
    exact = losses(data, trained("dense"))
    distance = [
        (losses(data, converted("dense"), moefy_k=k) - exact).abs().mean() for k in (15, 12, 8, 2)
    ]
    assert distance == sorted(distance) and distance[0] > 0


def test_true_best_are_closer_than_chosen_ones(converted, trained, data):
    """On the test set, whose sentences the routers have not seen."""
    exact = losses(data, trained("dense"))
    chosen, best = (
        (losses(data, converted("dense"), moefy_k=8, moefy_select=select) - exact).abs().mean()
        for select in ("mlp", "oracle")
    )
    assert best < chosen


# --------------------------------------------------------------------------------------
# as any checkpoint


@pytest.mark.parametrize("name", ["dense", "smoe"])
def test_translations_do_not_depend_on_the_batch(name, converted, data):
    together = generate(data, converted(name), **overrides(moefy_k=8))
    alone = generate(data, converted(name), batch_size=1, **overrides(moefy_k=8))
    same_translations(alone, together, 1e-5)


@pytest.mark.parametrize("name", ["dense", "vanilla"])
def test_trains_on_and_translates(name, converted, data, tmp_path):
    """20 updates from the converted model; the routers stay as they are."""
    words = ["--moefy-dense", "--moefy-experts", P, "--moefy-k", "75%"]
    if name == "vanilla":
        words += ["--moe-experts", "moefied"]
    outcome = train(
        data,
        tmp_path,
        *toy_task.MODELS[name],
        *words,
        finetune_from_model=converted(name),
        max_update=20,
        lr=1e-3,
        dropout=0,
    )
    losses = outcome.losses()
    assert len(losses) == 2 and losses[-1] < losses[0]
    before, after = model_of(converted(name)), model_of(tmp_path / "checkpoint_last.pt")
    assert before.keys() == after.keys()
    unchanged = {n for n in before if torch.equal(before[n], after[n])} - {"encoder.version"}
    assert all("router" in n or "version" in n or "_float" in n for n in unchanged), unchanged
    assert {n for n in before if "router" in n} <= unchanged
    assert generate(data, tmp_path / "checkpoint_last.pt").bleu > 90


def test_commands_take_it(converted, trained, data, text, tmp_path):
    checkpoint = converted("vanilla")
    lines = (text / "test.en-aa.en").read_text().splitlines()[:5]
    assert len(interactive(data, checkpoint, lines).sentences) == 5
    (tmp_path / "run").mkdir()
    words = ("--run", tmp_path / "run", "--checkpoint", checkpoint, "--data", data)
    main(["analyse", *map(str, words), "--directions", "en-aa", "--max-sentences", "5"])
    assert list((tmp_path / "run/analysis").rglob("*.csv"))


def test_evaluations_of_other_k_are_not_confused(converted, data, tmp_path, capsys):
    folder = tmp_path / "run"
    folder.mkdir()
    words = ["evaluate", "--run", folder, "--checkpoint", converted("dense"), "--data", data]
    words += ["--directions", "en-aa", "--cpu", "--processes", 1, "--metrics", "bleu"]

    def evaluate(*more):
        main([*map(str, words), *more])
        scores = json.loads((folder / "evaluation/test/scores.json").read_text())
        return scores, capsys.readouterr().err

    plain, _ = evaluate()
    assert "model_overrides" not in plain["settings"]
    changed, printed = evaluate("--model-overrides", "{'moefy_k': 0}")
    assert "translated again: not the same settings" in printed
    assert changed["settings"]["model_overrides"] == {"moefy_k": 0}
    assert changed["model"]["flops_per_token"] > plain["model"]["flops_per_token"]
    _, printed = evaluate("--model-overrides", "{'moefy_k': 0}")
    assert "translated again" not in printed
    for wrong, named in (
        ("{'moefy_k': 17}", "--moefy-k 17"),
        ("{'moefyk': 1}", "--model-overrides moefyk"),
        ("{'moefy_select': 'similarity'}", "--moefy-select"),
    ):
        with pytest.raises((OptionError, SystemExit)) as refusal:
            evaluate("--model-overrides", wrong)
        assert named in str(refusal.value) and "\n" not in str(refusal.value)


def test_flops_are_those_of_the_kept_experts(converted, data):
    """Dense FFNs and experts; routers count, too."""
    from fairseq_smoe.accounting.flops import flops_per_token
    from fairseq_smoe.evaluation.saved_model import read_saved_model

    found = {}
    for k in (0, 4):
        saved = read_saved_model(converted("vanilla"), data, {"moefy_k": k})
        options = saved.model_options
        model, _ = saved.build(toy_task.DIRECTIONS)
        found[k] = flops_per_token(model, options)
    dim, hidden = 64, 128
    router = P * dim + P * P
    saved_units = hidden * 3 // 4 * (2 * dim + 1)
    visits = 2 + 2 * 2  # dense layers, and expert layers with two experts a token
    assert found[0] - found[4] == pytest.approx(2 * visits * (saved_units - router))


# --------------------------------------------------------------------------------------
# parts, interruptions, memory


def test_a_checkpoint_in_parts(trained, converted, data, tmp_path):
    whole, parted, output = trained("vanilla"), tmp_path / "parted.pt", tmp_path / "moefied.pt"
    transform.write_in_parts(transform.stripped(read_checkpoint(whole)), 4, parted)
    convert(parted, output)
    assert same_models(output, converted("vanilla"))
    run("python", "-m", "fairseq_smoe", "checkpoint", "split", output, parted, "--parts", 2)
    assert describe(parted)["parts"] == 2
    for options in ({}, overrides(moefy_k=8, moefy_select="oracle")):
        parts = generate(data, parted, **options)
        assert parts.sentences == generate(data, output, **options).sentences


KILLED = """
import os, signal, sys
from fairseq_smoe.__main__ import main
from fairseq_smoe.conversion.moefy import work
stock, number = work.Work.keep, int(sys.argv.pop(1))
def keep(self, i, result):
    stock(self, i, result)
    if i == number:
        os.kill(os.getpid(), signal.SIGKILL)
work.Work.keep = keep
main(sys.argv[1:])
"""


def test_a_killed_conversion_goes_on(trained, converted, tmp_path, monkeypatch):
    output = tmp_path / "moefied.pt"
    words = ["convert", "moefy", trained("dense"), output, "--moefy-experts", P]
    killed = subprocess.run(
        [sys.executable, "-c", KILLED, "1", *map(str, words)],
        env=toy_task.environment(),
        cwd=toy_task.REPOSITORY,
        capture_output=True,
    )
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    work = tmp_path / "moefied.pt.work"
    assert not output.exists() and len(list(work.glob("ffn-*.pt"))) == 2
    fitted, fit = [], steps._fit
    monkeypatch.setattr(samples, "draw", None)  # the text is not read again
    monkeypatch.setattr(steps, "_fit", lambda *args: fitted.append(args[3]) or fit(*args))
    convert(trained("dense"), output)
    assert fitted == [2, 3] and not work.exists()
    assert same_models(output, converted("dense"))


def test_work_of_another_conversion_is_not_used(trained, converted, tmp_path, capsys):
    output = tmp_path / "moefied.pt"
    work = tmp_path / "moefied.pt.work"
    work.mkdir()
    (work / "conversion.json").write_text("{}")
    (work / "ffn-0.pt").write_text("of another")
    convert(trained("dense"), output)
    assert "begun anew" in capsys.readouterr().err
    assert same_models(output, converted("dense"))


LARGE = {
    **{"encoder_embed_dim": 384, "encoder_ffn_embed_dim": 1536, "encoder_attention_heads": 4},
    **{"decoder_attention_heads": 4, "encoder_layers": 5, "decoder_layers": 5},
}
CONVERT = """
import sys
from fairseq_smoe.evaluation import set_up_fairseq
set_up_fairseq()
import fairseq_smoe.conversion.moefy.steps
from fairseq_smoe.__main__ import main
print("ready", flush=True)
sys.stdin.readline()
main(sys.argv[1:])
"""


@pytest.mark.slow
def test_memory_is_within_that_of_two_models(data, tmp_path):
    cfg, _, model, _ = toy_task.set_up(data, "--moe-freq", "0", **LARGE)
    state = {
        "args": None,
        "cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True),
        "model": model.state_dict(),
        "optimizer_history": [{"num_updates": 1, "optimizer_name": "", "lr_scheduler_state": {}}],
        "extra_state": {"train_iterator": {"epoch": 1, "iterations_in_epoch": 0}},
        "task_state": {},
        "last_optimizer_state": None,
    }
    torch.save(state, tmp_path / "large.pt")
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    assert size > 80e6
    words = ["convert", "moefy", tmp_path / "large.pt", tmp_path / "moefied.pt"]
    words += ["--moefy-experts", 12, "--moefy-split", "random"]
    process = subprocess.Popen(
        [sys.executable, "-c", CONVERT, *map(str, words)],
        env=toy_task.environment(),
        cwd=toy_task.REPOSITORY,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )

    def memory():
        with open(f"/proc/{process.pid}/status") as status:
            found = re.search(r"RssAnon:\s+(\d+) kB", status.read())
        return int(found[1]) * 1024 if found else 0

    assert process.stdout.readline() == "ready\n"
    before, peak, ended = memory(), [0], threading.Event()

    def sample():
        while not ended.wait(0.005):
            peak[0] = max(peak[0], memory())

    sampling = threading.Thread(target=sample)
    sampling.start()
    process.communicate("\n")
    ended.set()
    sampling.join()
    shutil.rmtree(tmp_path / "moefied.pt.work", ignore_errors=True)
    assert process.returncode == 0
    assert (peak[0] - before) / size < 2, (peak[0] - before) / size


# --------------------------------------------------------------------------------------
# refusals


@pytest.mark.parametrize(
    "name, words, named",
    [
        ("dense", ["--layers", "all"], ["--layers all", "dense, experts"]),
        ("dense", ["--layers", "experts"], ["--layers experts", "no experts", "dense"]),
        ("dense", ["--moefy-experts", "1"], ["--moefy-experts 1", "2 or more"]),
        ("dense", ["--moefy-experts", "48"], ["--moefy-experts 48", "128", "32 or 64"]),
        ("dense", ["--moefy-k", "17"], ["--moefy-k 17", f"--moefy-experts {P}"]),
        ("dense", ["--moefy-k", "x"], ["--moefy-k x", "percentage"]),
        ("dense", ["--router-tokens", "9"], ["--router-tokens 9", "100 or more"]),
        ("dense", ["--subset", "test"], ["--subset test", "--subset valid"]),
        ("hmoe", ["--layers", "experts"], ["--layers experts", "sized", "ffn"]),
    ],
)
def test_wrong_options_are_named(name, words, named, data, tmp_path, trained):
    source = trained("dense") if name == "dense" else untrained(data, tmp_path, name)
    with pytest.raises((OptionError, SystemExit)) as refusal:
        convert(source, tmp_path / "moefied.pt", *words)
    message = str(refusal.value)
    assert "\n" not in message and all(part in message for part in named), message
    assert not (tmp_path / "moefied.pt").exists()


def untrained(data, folder, name, **options):
    cfg, _, model, _ = toy_task.set_up(data, *toy_task.MODELS[name], **options)
    state = {"cfg": OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)}
    torch.save(state | {"model": model.state_dict()}, folder / "untrained.pt")
    return folder / "untrained.pt"


def test_other_activations_are_refused(data, tmp_path):
    source = untrained(data, tmp_path, "dense", activation_fn="gelu")
    with pytest.raises(
        (OptionError, SystemExit), match="--activation-fn gelu.* --finetune-from-model"
    ):
        convert(source, tmp_path / "moefied.pt")


def test_a_moefied_model_is_not_converted_again(converted, tmp_path):
    with pytest.raises((OptionError, SystemExit), match="split into small experts already"):
        convert(converted("dense"), tmp_path / "again.pt")


def test_a_missing_package_is_named(trained, tmp_path, monkeypatch):
    from fairseq_smoe.commands.convert import moefy

    monkeypatch.setattr(moefy, "find_spec", lambda name: None)
    with pytest.raises(
        (OptionError, SystemExit), match="--moefy-split graph: needs the package pymetis; pip"
    ):
        convert(trained("dense"), tmp_path / "moefied.pt", "--moefy-split", "graph")


def test_training_without_the_options_is_refused(converted, data, tmp_path):
    """And the other way round."""
    for words in (
        [],
        ["--moefy-dense", "--moefy-experts", P, "--moefy-select", "similarity"],
        ["--moefy-dense", "--moefy-experts", 8],
    ):
        outcome = train(
            data,
            tmp_path,
            *("--moe-freq", "0", *words),
            finetune_from_model=converted("dense"),
            max_update=1,
            check=False,
        )
        last = outcome.stderr.splitlines()[-1]
        assert last.startswith("error: ") and "--moefy-dense" in last, outcome.tail()


def test_wrong_overrides_are_answered_in_one_line(converted, data):
    for options, named in (
        (dict(moefy_k=17), "--moefy-k 17"),
        (dict(moefy_select="similarity"), "--moefy-select"),
    ):
        outcome = generate(data, converted("dense"), check=False, **overrides(**options))
        last = outcome.stderr.splitlines()[-1]
        assert last.startswith("error: ") and named in last, outcome.tail()
