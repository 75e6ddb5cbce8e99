"""Pictures: from the analysis of a run and from training logs."""

import importlib.util
import json

import pytest

pytest.importorskip("matplotlib")

import matplotlib.image  # noqa: E402

from fairseq_smoe.__main__ import main  # noqa: E402
from fairseq_smoe.analysis.tables import COLUMNS, read_table, write_table  # noqa: E402
from fairseq_smoe.benchmarks import benchmark as benchmarks  # noqa: E402
from fairseq_smoe.plots.capacity_directions import side_means  # noqa: E402
from fairseq_smoe.plots.capacity_layers import layer_means  # noqa: E402
from fairseq_smoe.plots.experts import language_shares  # noqa: E402
from fairseq_smoe.plots.experts_per_token import stratum_means  # noqa: E402
from fairseq_smoe.plots.style import PER_BAND, arrange  # noqa: E402
from fairseq_smoe.plots.train_log import curves, read_log  # noqa: E402

EXPERTS_PER_TOKEN = ["experts-per-token-directions", "experts-per-token-layers"]
PICTURES = ["capacity-directions", "capacity-layers", *EXPERTS_PER_TOKEN] + [
    f"{name}-{side}"
    for name in ("experts", "frequency-ranks", "strata")
    for side in ("encoder", "decoder")
]


def write_analysis(folder, directions, subset="valid", experts=(2, 1), columns=COLUMNS):
    """Tables as `analyse` writes them: a block a side, strata of 2 and 2. A token visits
    ``experts`` of the first stratum, more of some directions, and of the second."""
    target = folder / "analysis" / subset
    target.mkdir(parents=True)
    tables = {name: [] for name in COLUMNS}
    for d, direction in enumerate(directions):
        for side in ("encoder", "decoder"):
            for block in (1,):
                key = (direction, side, block)
                first, second = experts[0] * (1 + d % 7), experts[1]
                capacity, per_token = 1 + (d % 7) / 10, first + 0.4 * second
                tables["capacity"].append((*key, 2 * block, capacity, 100, per_token))
                tables["experts"] += [
                    (*key, e + 1, e // 2 + 1, 10 * e, 20 * e, e / 6) for e in range(4)
                ]
                tables["strata"] += [
                    (*key, 1, 100, 1.0, 60, first),
                    (*key, 2, 40, 0.4, 40, second),
                ]
                for end, ranks in (("highest", (900, 30, 4000)), ("lowest", (7, 7, 7))):
                    tables["types"] += [
                        (*key, end, "12", 9, {"highest": 2.5}.get(end, 1.5), 3, rank)
                        for rank in ranks
                    ]
    for name, rows in tables.items():
        width = len(columns[name])
        write_table(target / f"{name}.csv", columns[name], [row[:width] for row in rows])


def write_run(folder, benchmark):
    folder.mkdir(parents=True)
    facts = {"benchmark": benchmark.name, "row": benchmark.rows[-1].name, "scale": "tiny"}
    (folder / "run.json").write_text(json.dumps(facts))


def test_pictures_of_30_directions(tmp_path, capsys):
    benchmark = benchmarks.load("m15")
    run = tmp_path / "run"
    write_run(run, benchmark)
    write_analysis(run, benchmark.directions())
    main(["plot", str(run)])
    folder = run / "plots" / "valid"
    assert sorted(path.stem for path in folder.glob("*.png")) == sorted(PICTURES)
    assert len(capsys.readouterr().out.splitlines()) == len(PICTURES)
    for name in PICTURES:
        assert read_table(folder / f"{name}.csv")
        image = matplotlib.image.imread(folder / f"{name}.png")
        assert image[..., :3].std() > 0.02  # something is drawn
        if not name.endswith("-layers"):
            assert image.shape[1] > 15 * 40  # room for every label
    rows = read_table(folder / "capacity-directions.csv")
    high = [language.code for language in benchmark.languages if language.resource == "high"]
    assert [row["direction"] for row in rows[: len(high)]] == [f"eng-{code}" for code in high]
    assert rows[15]["direction"] == f"{high[0]}-eng"


def test_experts_per_token_are_means_over_directions(tmp_path):
    write_analysis(tmp_path, ["en-aa", "en-bb"])
    main(["plot", str(tmp_path)])
    folder = tmp_path / "plots" / "valid"
    rows = read_table(folder / "experts-per-token-directions.csv")
    assert [tuple(row.values()) for row in rows] == [("en-aa", 2.4, 2.4), ("en-bb", 4.4, 4.4)]
    rows = read_table(folder / "experts-per-token-layers.csv")
    assert [tuple(row.values()) for row in rows] == [
        (side, 1, 2, *of_stratum)
        for side in ("encoder", "decoder")
        for of_stratum in ((1, 3.0, 3.0, 200), (2, 0.4, 1.0, 80))
    ]


def test_strata_that_no_token_has_met():
    names = COLUMNS["capacity"], COLUMNS["strata"]
    capacity = [dict(zip(names[0], ("a-b", "encoder", 1, 2, 1.0, 10, 3.0)))]
    strata = [
        dict(zip(names[1], ("a-b", "encoder", 1, *row)))
        for row in ((1, 10, 1.0, 10, 3.0), (2, 0, 0.0, 0, float("nan")))
    ]
    assert stratum_means(capacity, strata) == [
        ("encoder", 1, 2, 1, 3.0, 3.0, 10),
        ("encoder", 1, 2, 2, 0.0, 0.0, 0),
    ]


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"experts": (0, 5)}, "because it is 2 in all directions and layers"),
        (
            {
                "columns": {
                    **COLUMNS,
                    **{name: COLUMNS[name][:-1] for name in ("capacity", "strata")},
                }
            },
            "because an earlier version has counted; analyse again",
        ),
    ],
)
def test_no_picture_of_experts_per_token(changes, reason, tmp_path, capsys):
    """Of a fixed number, or of tables of an earlier version; all others are drawn."""
    write_analysis(tmp_path, ["en-aa", "en-bb"], **changes)
    main(["plot", str(tmp_path)])
    out, err = capsys.readouterr()
    assert err == f"{tmp_path / 'analysis' / 'valid'}: no picture of experts per token, {reason}\n"
    drawn = {path.stem for path in (tmp_path / "plots" / "valid").glob("*.png")}
    assert drawn == set(PICTURES) - set(EXPERTS_PER_TOKEN)


def test_hundreds_of_directions_are_drawn_in_rows():
    benchmark = benchmarks.load("opus100")
    bands = arrange(benchmark.directions(), benchmark)
    shown = [direction for band in bands for direction in band.directions]
    assert sorted(shown) == sorted(benchmark.directions())
    assert all(len(band.directions) <= PER_BAND for band in bands)
    resources = {language.code: language.resource for language in benchmark.languages}
    order = ["high", "medium", "low"]
    for title in ("out of en", "into en"):
        levels = [resources[label] for b in bands if b.title == title for label in b.labels]
        assert len(levels) == 94
        assert levels == sorted(levels, key=order.index)
    assert all(sum(size for _, size in b.groups) == len(b.directions) for b in bands)


def test_without_a_benchmark_the_common_language_divides_the_directions():
    bands = arrange(["de-en", "en-de", "en-nl", "nl-en"])
    assert [(b.title, b.directions) for b in bands] == [
        ("out of en", ["en-de", "en-nl"]),
        ("into en", ["de-en", "nl-en"]),
    ]
    (band,) = arrange(["de-nl", "fr-es"])
    assert band.directions == ["de-nl", "fr-es"]


def test_means_weigh_by_tokens():
    names = COLUMNS["capacity"]
    rows = [
        dict(zip(names, row))
        for row in (
            ("a-b", "encoder", 1, 2, 2.0, 300),
            ("a-b", "encoder", 2, 4, 1.0, 100),
            ("b-a", "encoder", 1, 2, 1.0, 100),
        )
    ]
    assert side_means(rows) == {"a-b": {"encoder": 1.75}, "b-a": {"encoder": 1.0}}
    assert layer_means(rows) == [("encoder", 1, 2, 1.75, 400), ("encoder", 2, 4, 1.0, 100)]


def test_shares_of_experts_are_over_all_directions_with_the_language():
    names = COLUMNS["experts"]
    rows = [
        dict(zip(names, row))
        for row in (
            ("a-b", "decoder", 1, 1, 1, 30, 0, 0.3),
            ("a-b", "decoder", 1, 2, 2, 70, 0, 0.7),
            ("c-b", "decoder", 1, 1, 1, 300, 0, 1.0),
            ("c-b", "decoder", 1, 2, 2, 0, 0, 0.0),
            ("a-b", "encoder", 1, 1, 1, 5, 0, 1.0),
        )
    ]
    assert language_shares(rows, "decoder") == [
        ("b", 1, 1, 1, 330, 0.825),
        ("b", 1, 2, 2, 70, 0.175),
    ]
    assert language_shares(rows, "encoder") == [("a", 1, 1, 1, 5, 1.0)]


# --------------------------------------------------------------------------------------
# curves


def test_curves_of_a_real_training(short_run, tmp_path):
    """The log as printed, with time and place in front of each record, and as --log-file has it."""
    printed = (short_run / "stdout").read_text()
    bare = [line[line.find("{") :] for line in printed.splitlines() if line.endswith("}")]
    logs = tmp_path / "printed", tmp_path / "bare"
    logs[0].write_text(printed)
    logs[1].write_text("begin\n" + "\n".join(bare))
    found, same = map(curves, logs)
    assert found == same
    for quantity in ("train_loss", "balance_loss", "encoder_capacity", "decoder_experts"):
        assert [updates for updates, _ in found[quantity]] == [10, 20, 30]
    # the model's gates always choose two; those beyond an expert's capacity are dropped
    capacities, experts = (dict(found[f"decoder_{name}"]) for name in ("capacity", "experts"))
    assert all(experts[u] <= 2 * capacities[u] + 0.002 for u in (10, 20, 30))
    assert [updates for updates, _ in found["valid_loss"]][-1] == 30
    assert "valid_bleu" not in found
    assert found["train_loss"][0][1] > found["train_loss"][-1][1] > 0


def record(kind, updates, **values):
    prefix = "" if kind == "train_inner" else f"{kind}_"
    values = {f"{prefix}{name}": str(value) for name, value in values.items()}
    return json.dumps({**values, f"{prefix}num_updates": str(updates)}) + "\n"


def test_a_resumed_training_repeats_updates(tmp_path):
    log = tmp_path / "train.log"
    log.write_text(
        "".join(record("train_inner", u, nll_loss=u) for u in (10, 20, 30, 35))
        + record("valid", 20, nll_loss=5, bleu=3)
        + '{"loss": "cut of'
        + "\n"
        + record("train_inner", 30, nll_loss=300)  # from a checkpoint at 20
        + record("valid", 40, nll_loss=4, bleu=6)
        + record("train_inner", 40, nll_loss=400)
    )
    found = curves(log)
    assert found["train_loss"] == [(10, 10.0), (20, 20.0), (30, 300.0), (40, 400.0)]
    assert found["valid_bleu"] == [(20, 3.0), (40, 6.0)]
    assert set(read_log(log)) == {"train_inner", "valid"}


def test_curves_of_several_runs_are_one_picture(tmp_path, capsys):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.log").write_text(
            record("train_inner", 10, loss=3.5) + record("valid", 10, loss=3.25)
        )
    main(["plot", str(tmp_path / "one"), str(tmp_path / "two")])
    assert capsys.readouterr().out.split() == [str(tmp_path / "plots" / "curves.png")]
    rows = read_table(tmp_path / "plots" / "curves.csv")
    assert [tuple(row.values()) for row in rows] == [
        (name, quantity, 10, value)
        for name in ("one", "two")
        for quantity, value in (("train_loss", 3.5), ("valid_loss", 3.25))
    ]


def test_nothing_to_draw(tmp_path):
    with pytest.raises(SystemExit, match="nothing to draw.* python -m fairseq_smoe analyse --run"):
        main(["plot", str(tmp_path)])
    with pytest.raises(SystemExit, match="no such run"):
        main(["plot", str(tmp_path / "missing")])


def test_without_matplotlib(tmp_path, monkeypatch):
    stock = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "matplotlib" else stock(name)
    )
    with pytest.raises(SystemExit, match=r'pip install "fairseq-smoe\[plot\]"'):
        main(["plot", str(tmp_path)])
