"""Counts of routing: the collector, the tables, and the command."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
import torch
import toy_task
from fairseq.sequence_generator import SequenceGenerator

from fairseq_smoe.__main__ import main
from fairseq_smoe.analysis import collector as collector_module
from fairseq_smoe.analysis.collector import RoutingCollector
from fairseq_smoe.analysis.frequency import TrainingFrequencies
from fairseq_smoe.analysis.passes import batches, direction_datasets, run_pass
from fairseq_smoe.analysis.tables import choose_types, read_table
from fairseq_smoe.moe.gate import Choices, Gate
from fairseq_smoe.translation.layers import expert_layers


def load(data, name):
    """An untrained model with its task; experts are chosen about evenly."""
    _, task, model, _ = toy_task.set_up(data, *toy_task.MODELS[name])
    return task, model.eval()


def collect(task, model, dataset, **limits):
    with RoutingCollector(model, len(task.source_dictionary)) as collector:
        run_pass(model, dataset, batches(dataset, task.max_positions(), **limits))
        return collector.take()


def recount(model, dataset):
    """The same, sentence by sentence and token by token (or head by head), with Counters."""
    found = {}
    for i in range(len(dataset)):
        sample = dataset.collater([dataset[i]])["net_input"]
        with torch.no_grad():
            model(**sample)
        for name, layer in expert_layers(model):
            counts = found.setdefault(
                name, {k: Counter() for k in ("types", "first", "choices", "visits", "chosen")}
            )
            side = name.split(".")[0]
            tokens = sample["src_tokens" if side == "encoder" else "prev_output_tokens"][0]
            tokens = tokens.repeat_interleave(layer.routing_stats.heads)
            block = getattr(layer.expert_block, "block", layer.expert_block)
            stacked = type(block).__name__ == "StackedMoEBlock"
            stratum = [0] * len(tokens)
            passes = [0] * len(tokens)
            for g, gate in enumerate(layer.routing_stats.gates):
                here = [t for t in range(len(tokens)) if stacked or stratum[t] == g]
                start = block.visible[g].start
                for column, t in enumerate(here):
                    chosen = gate.expert_C[gate.token_C == column] + start
                    best = int(gate.best_T[column]) + start
                    counts["first"][best] += 1
                    counts["choices"].update(chosen.tolist())
                    counts["visits"][g] += 1
                    counts["chosen"][g] += len(chosen)
                    passes[t] += 1
                    while best >= sum(block.strata[: stratum[t] + 1]):
                        stratum[t] += 1
                    stratum[t] += 1
            counts["types"].update(zip(tokens.tolist(), passes))
    return list(found.values())


class Likely(Gate):
    """Visits all experts that are likelier than the mean, or a little less."""

    def forward(self, tokens_TD, here_T=None):
        scores_TE = self.logits(tokens_TD).softmax(dim=1)
        return Choices.where(scores_TE, scores_TE > 0.95 / scores_TE.shape[1])


def any_number_of_experts(gates):
    likely = torch.nn.ModuleList(Likely(*gate.weight.t().shape).eval() for gate in gates)
    likely.load_state_dict(gates.state_dict())
    return likely


def as_counter(array):
    return Counter({i: n for i, n in enumerate(array.tolist()) if n})


@pytest.mark.parametrize(
    "name", ["smoe", "vanilla", "switch", "stacking", "cmr", "multi-head", "any number"]
)
@pytest.mark.parametrize("flush_at", [1, 1 << 16])
def test_counts_equal_a_recount_token_by_token(data, name, flush_at, monkeypatch):
    monkeypatch.setattr(collector_module, "FLUSH_AT", flush_at)
    task, model = load(data, "smoe" if name == "any number" else name)
    dataset = direction_datasets(task, "valid")["en-aa"]
    if name == "any number":
        for _, layer in expert_layers(model):
            layer.routed_block.gates = any_number_of_experts(layer.routed_block.gates)
    blocks = collect(task, model, dataset, max_tokens=60)
    expected = recount(model, dataset)
    assert [block.side for block in blocks] == ["encoder", "decoder"]
    assert len(blocks) == len(expected)
    for block, counts in zip(blocks, expected):
        found = {
            (int(v), int(p)): int(block.types_VP[v, p]) for v, p in np.argwhere(block.types_VP)
        }
        assert found == counts["types"]
        assert as_counter(block.first_E) == counts["first"]
        assert as_counter(block.choices_E) == counts["choices"]
        assert as_counter(block.visits_L) == counts["visits"]
        assert as_counter(block.chosen_L) == counts["chosen"]
        heads = 4 if name == "multi-head" else 1
        number = sum(counts["types"].values()) / heads
        assert block.tokens == number
        total = sum(p * n for (_, p), n in counts["types"].items())
        assert block.requested_capacity == pytest.approx(total / number / heads)
        assert block.experts_per_token == pytest.approx(sum(counts["chosen"].values()) / number)
        if name in ("vanilla", "switch", "multi-head"):
            per_visit = 1 if name == "switch" else 2
            assert block.experts_per_visit_L[0] == per_visit
        assert block.layer == 2
        if name in ("smoe", "any number", "multi-head"):
            assert len(set(found.values())) > 2 and block.requested_capacity > 1
        if name == "any number":
            assert {count % 1 == 0 for count in block.experts_per_visit_L} == {False}
        count_V, capacity_V = block.type_counts()
        assert count_V.sum() == number
        mean = (count_V * np.nan_to_num(capacity_V)).sum() / number
        assert mean == pytest.approx(block.requested_capacity)


def test_counts_do_not_depend_on_the_batches(data):
    task, model = load(data, "smoe")
    dataset = direction_datasets(task, "valid")["bb-en"]
    small, large = (collect(task, model, dataset, max_tokens=n) for n in (20, 4000))
    for one, other in zip(small, large):
        for name in ("types_VP", "first_E", "choices_E", "visits_L", "chosen_L"):
            assert np.array_equal(getattr(one, name), getattr(other, name))


@pytest.mark.parametrize("beam", [1, 3])
def test_in_beam_search_the_tokens_are_those_of_every_beam_and_step(data, beam):
    task, model = load(data, "smoe")
    dataset = direction_datasets(task, "valid")["en-aa"]
    fed = Counter()
    stock = model.decoder.forward

    def forward(tokens, *args, **kwargs):
        fed.update(tokens[:, -1].tolist())
        return stock(tokens, *args, **kwargs)

    model.decoder.forward = forward
    generator = SequenceGenerator([model], task.target_dictionary, beam_size=beam, max_len_b=12)
    sample = dataset.collater([dataset[i] for i in range(len(dataset))])
    with RoutingCollector(model, len(task.source_dictionary)) as collector:
        generator.generate([model], sample)
        encoder, decoder = collector.take()
    assert as_counter(decoder.types_VP.sum(axis=1)) == fed
    source = sample["net_input"]["src_tokens"]
    expected = Counter(source[source != task.source_dictionary.pad()].tolist())
    assert as_counter(encoder.types_VP.sum(axis=1)) == expected


def test_hooks_come_off_again(data):
    task, model = load(data, "smoe")
    dataset = direction_datasets(task, "valid")["en-aa"]
    collector = RoutingCollector(model, len(task.source_dictionary))
    collector.remove()
    run_pass(model, dataset, batches(dataset, task.max_positions(), max_tokens=400))
    assert all(block.tokens == 0 for block in collector.take())


def test_a_sample_of_sentences_is_drawn_without_replacement(data):
    task, _ = load(data, "dense")
    dataset = direction_datasets(task, "train")["en-aa"]
    limits = dict(max_positions=task.max_positions(), max_tokens=200, max_sentences=40)
    first, again, other = (batches(dataset, **limits, seed=seed) for seed in (1, 1, 2))
    drawn = [set(np.concatenate(parts).tolist()) for parts in (first, again, other)]
    assert [len(d) for d in drawn] == [40] * 3
    assert drawn[0] == drawn[1] != drawn[2]


# --------------------------------------------------------------------------------------
# tables


def test_frequencies_are_those_of_the_training_text(data, text, tmp_path):
    task, _ = load(data, "dense")
    dictionary = task.source_dictionary
    frequencies = TrainingFrequencies(data, tmp_path, dictionary)
    expected = Counter()
    for other in ("aa", "bb"):  # English is in the files of both pairs
        words = (text / f"train.en-{other}.en").read_text()
        expected.update(words.split())
    counts = frequencies.counts("en")
    words = {dictionary[i]: int(n) for i, n in enumerate(counts) if n and i >= dictionary.nspecial}
    assert words == expected
    ranks = frequencies.ranks("en")
    assert sorted(ranks) == list(range(1, len(dictionary) + 1))
    assert (np.diff(counts[np.argsort(ranks)]) <= 0).all()
    # kept, unless the training files are others
    kept = TrainingFrequencies(data, tmp_path, dictionary)
    assert np.array_equal(kept.counts("en"), counts)
    with np.load(tmp_path / "en.npz") as cache:
        wrong = dict(counts=np.zeros_like(counts), identity=cache["identity"])
    np.savez(tmp_path / "en.npz", **wrong)
    assert not TrainingFrequencies(data, tmp_path, dictionary).counts("en").any()
    np.savez(tmp_path / "en.npz", counts=wrong["counts"], identity="older files")
    assert np.array_equal(TrainingFrequencies(data, tmp_path, dictionary).counts("en"), counts)


def test_types_of_highest_and_lowest_capacity():
    count = np.array([9, 9, 9, 4, 9, 9, 0])
    capacity = np.array([3.0, 1.5, 2.0, 9.0, 1.0, 5.0, np.nan])
    chosen = choose_types(count, capacity, leave_out=[5], number=2, min_count=5)
    assert chosen["highest"].tolist() == [0, 2]
    assert chosen["lowest"].tolist() == [4, 1]
    # no type stands at both ends
    chosen = choose_types(count, capacity, leave_out=[5, 0], number=2, min_count=5)
    assert chosen["highest"].tolist() == [2] and chosen["lowest"].tolist() == [4]


def test_types_of_equal_capacity_are_not_chosen_by_their_number():
    """Which is a matter of frequency."""
    chosen = choose_types(np.full(1000, 9), np.ones(1000), number=100)
    for ids in chosen.values():
        assert 300 < np.mean(ids) < 700


# --------------------------------------------------------------------------------------
# the command


@pytest.fixture
def run_folder(trained, tmp_path):
    """``run_folder(name)``: a run folder with the checkpoints of a trained model."""

    def make(name):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "checkpoints").symlink_to(trained(name).parent)
        return folder

    return make


def test_the_command_writes_what_the_collector_counts_and_goes_on_where_it_was(
    run_folder, data, capsys
):
    folder = run_folder("smoe")
    target = folder / "analysis" / "valid"
    command = ["analyse", "--run", str(folder), "--min-count", "3"]
    main([*command, "--directions", "en-aa,bb-en"])
    assert "2 directions are still to do" in capsys.readouterr().out
    rows = read_table(target / "capacity.csv")
    assert [row["direction"] for row in rows] == ["en-aa", "en-aa", "bb-en", "bb-en"]
    kept = {part: part.stat().st_mtime_ns for part in (target / "parts").iterdir()}
    outcome = toy_task.run("python", "-m", "fairseq_smoe", *command)
    assert "still to do" not in outcome.stdout
    assert {part: part.stat().st_mtime_ns for part in kept} == kept

    task, model = toy_task.load(data, folder / "checkpoints" / "checkpoint_best.pt", "bb-en")
    dataset = direction_datasets(task, "valid")["bb-en"]
    blocks = collect(task, model, dataset, max_tokens=100)
    tables = {
        name: [r for r in read_table(target / f"{name}.csv") if r["direction"] == "bb-en"]
        for name in ("capacity", "experts", "strata", "types")
    }
    for row, block in zip(tables["capacity"], blocks, strict=True):
        assert (row["side"], row["block"], row["layer"]) == (block.side, 1, 2)
        assert row["tokens"] == block.tokens
        assert row["requested_capacity"] == pytest.approx(block.requested_capacity, abs=1e-5)
        assert row["experts_per_token"] == pytest.approx(2 * block.requested_capacity, abs=1e-5)
    for block in blocks:
        experts = [row for row in tables["experts"] if row["side"] == block.side]
        assert [row["first_choices"] for row in experts] == block.first_E.tolist()
        assert [row["stratum"] for row in experts] == [1, 1, 2, 2, 3, 3, 4, 4]
        assert sum(row["share"] for row in experts) == pytest.approx(1, abs=1e-5)
        strata = [row for row in tables["strata"] if row["side"] == block.side]
        assert strata[0]["visits"] == sum(row["exits"] for row in strata) == block.tokens
        assert {row["experts_per_visit"] for row in strata if row["visits"]} == {2}
        types = [row for row in tables["types"] if row["side"] == block.side]
        language = {"encoder": "bb", "decoder": "en"}[block.side]
        assert types and all(re.fullmatch(rf"{language}\d", row["token"]) for row in types)
        assert all(row["count"] >= 3 for row in types)
        ends = {
            end: [r["requested_capacity"] for r in types if r["end"] == end]
            for end in ("highest", "lowest")
        }
        assert min(ends["highest"]) >= max(ends["lowest"])


def test_other_settings_start_anew(run_folder, capsys):
    folder = run_folder("smoe")
    command = ["analyse", "--run", str(folder), "--directions", "en-aa", "--subset", "train"]
    main([*command, "--max-sentences", "10"])
    few = read_table(folder / "analysis/train/capacity.csv")
    main([*command, "--max-sentences", "50"])
    more = read_table(folder / "analysis/train/capacity.csv")
    assert len(few) == len(more) == 2
    assert more[0]["tokens"] > 3 * few[0]["tokens"]


def test_other_text_starts_anew(run_folder, data, tmp_path):
    """In the same data folder."""
    shutil.copytree(data, tmp_path / "data")
    folder = run_folder("smoe")
    command = ["analyse", "--run", str(folder), "--directions", "en-aa"]
    command += ["--data", str(tmp_path / "data")]
    main(command)
    valid = read_table(folder / "analysis/valid/capacity.csv")
    for path in (tmp_path / "data").glob("test.en-aa.*"):
        shutil.copy(path, path.with_name(path.name.replace("test", "valid")))
    main(command)
    test = read_table(folder / "analysis/valid/capacity.csv")
    assert test[0]["tokens"] > 1.5 * valid[0]["tokens"]  # 60 sentences, not 30


@pytest.mark.parametrize(
    "options, words",
    [
        (["--directions", "en-xx"], "--directions en-xx: no valid sentences"),
        (["--checkpoint", "missing.pt"], "missing.pt: no such checkpoint"),
        (["--checkpoint", __file__], "is damaged, or no checkpoint"),
        (["--max-tokens", "0"], "--max-tokens 0: expected 1 or more"),
        (["--data", "missing-data"], "missing-data: no such data folder"),
    ],
)
def test_mistakes(run_folder, options, words):
    with pytest.raises(SystemExit, match=words):
        main(["analyse", "--run", str(run_folder("smoe")), *options])


def test_a_run_must_be_named():
    with pytest.raises(SystemExit, match="BENCHMARK ROW"):
        main(["analyse"])


def test_a_dense_model_has_nothing_to_analyse(run_folder, tmp_path, data, capsys):
    folder = tmp_path / "dense"
    toy_task.train(data, folder / "checkpoints", *toy_task.MODELS["dense"], max_update=2)
    main(["analyse", "--run", str(folder)])
    assert "a dense model without experts" in capsys.readouterr().out
    assert not (folder / "analysis").exists()
