"""The page says what the runs say, whatever state they are in, and nothing in it is more than text."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from quiltnet.cli.app import app
from quiltnet.errors import UserError
from quiltnet.release.report import MARK, check_report_path, number, render_report, signed
from quiltnet.release.report_curves import line_chart, round_ticks, thinned, tick_labels
from quiltnet.release.report_scores import score_tables, verdict
from quiltnet.release.report_subjects import read_subjects
from quiltnet.release.run_files import add_changes
from tests.release.reported_runs import BREAK_OUT, SCRIPT, SIGNED, TOKEN, Page, results, write_run


def page_of(*runs, **options) -> Page:
    return Page(render_report(read_subjects(runs), **options))


def test_a_run_is_told_whole(tmp_path):
    page = page_of(write_run(tmp_path / "demo", found=results()))
    sections = ["Verdict", "Curves", "Scores", "Confusion", "Samples", "Data", "Configuration", "Environment"]
    anchors = [link["href"] for link in page.all("a")]
    assert anchors == [f"#{name.lower()}" for name in sections]
    assert set(anchors) <= {f"#{name}" for name in page.ids}
    assert "finished, 640 of 640 samples" in page.words
    assert "2 × NVIDIA H100" in page.words and "torch 2.14.1" in page.words and "attrs" not in page.words
    assert "torchrun --nproc-per-node 2 train.py run_name=demo" in page.words
    assert "changes that were not committed" in page.words
    assert "Not defined: auroc (one class has no image)" in page.words
    assert "20 images, split test" in page.words


def test_nothing_is_loaded_and_no_script_runs(tmp_path):
    page = page_of(write_run(tmp_path / "demo", found=results()))
    (policy,) = [tag["content"] for tag in page.all("meta") if tag.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; style-src 'unsafe-inline'; img-src data:;")
    assert not {"script", "link", "iframe", "object", "embed", "base", "form"} & {tag for tag, _ in page.tags}
    assert all(value.startswith(("#", "data:")) for _, tag in page.tags for name, value in tag.items()
               if name in ("src", "href"))  # fmt: skip


def test_what_runs_say_is_text(tmp_path):
    hostile = results()
    hostile["outcomes"][SCRIPT] = hostile["outcomes"].pop("retrieval_val")
    hostile["start"][f"{SCRIPT}/image_to_text_median_rank"] = 3.0
    run = write_run(tmp_path / "<b onclick=alert(1)>x", found=hostile, note=BREAK_OUT, **{BREAK_OUT: {SCRIPT: SCRIPT}})
    page = page_of(run, share_samples=True)
    assert not {"script", "b onclick=alert(1)"} & {tag for tag, _ in page.tags}
    assert not [tag for tag in page.all("img") if not tag["src"].startswith("data:")]
    assert not [name for _, tag in page.tags for name in tag if name.startswith("on")]
    assert SCRIPT in page.text and BREAK_OUT in page.text and "<b onclick=alert(1)>x" in page.text


@pytest.mark.parametrize("share_samples", [False, True])
def test_secrets_never_and_places_only_where_samples_are_shared(tmp_path, share_samples):
    run = write_run(tmp_path / "demo", found=results(), data={"train": {"shards": "/scans/smith_john"}}, url=SIGNED)
    text = render_report(read_subjects([run]), share_samples=share_samples)
    assert TOKEN not in text and "0123456789abcdef0123" not in text
    assert ("smith_john" in text) == share_samples
    assert ("data.train.shards=***" in text) != share_samples


def test_better_and_worse_go_by_the_metric_and_its_interval(tmp_path):
    (subject,) = read_subjects([write_run(tmp_path / "demo", found=results())])
    found = {f"{shift.evaluator}/{shift.metric}": shift.direction for shift in verdict(subject).shifts}
    assert found == {
        "zeroshot_tissue/balanced_accuracy": "better",
        "zeroshot_tissue/accuracy": "unclear",  # the start lies within the interval
        "val_pairs/loss": "better",  # less is better
        "retrieval_val/image_to_text_median_rank": "worse",
    }
    page = page_of(subject.run.path)
    assert "2 of 4 metrics better, 1 worse, 1 not told apart" in page.words
    assert "retrieval_val, image to text median rank: 3 to 9" in page.words


def test_the_paired_interval_decides_where_there_is_one(tmp_path):
    run = write_run(tmp_path / "demo", found=results())
    changes = {
        "zeroshot_tissue/balanced_accuracy": (0.6, -0.01, 0.7),  # zero within
        "zeroshot_tissue/accuracy": (-0.05, -0.08, -0.02),
        "val_pairs/loss": (-1.0, float("nan"), 0.0),
    }
    add_changes(run / "results.json", changes)
    kept = json.loads((run / "results.json").read_text())
    assert "val_pairs/loss" not in kept["changes"] and kept["start"] == results()["start"]
    (subject,) = read_subjects([run])
    found = {f"{shift.evaluator}/{shift.metric}": shift.direction for shift in verdict(subject).shifts}
    assert found["zeroshot_tissue/balanced_accuracy"] == "unclear" and found["zeroshot_tissue/accuracy"] == "worse"


def test_the_best_checkpoint_is_what_a_run_is_judged_by(tmp_path):
    best = {"samples_seen": 320, "scores": {"val_pairs/loss": 0.5, "zeroshot_tissue/accuracy": 0.8}}
    (subject,) = read_subjects([write_run(tmp_path / "demo", found=results(best=best))])
    assert {shift.last for shift in verdict(subject).shifts if shift.metric == "loss"} == {0.5}
    table = next(table for table in score_tables([subject]) if table.evaluator == "val_pairs")
    assert table.columns == ["Start", "Last", "Change", "Best checkpoint (320)"]
    assert [cell.value for cell in table.rows["loss"]] == [2.5, 1.5, -2.0, 0.5]


def test_several_runs_are_compared(tmp_path):
    other = results()
    other["outcomes"]["zeroshot_tissue"]["scores"]["balanced_accuracy"] = 0.95
    other["outcomes"]["zeroshot_tissue@ema"] = {"scores": {"balanced_accuracy": 0.97}}
    runs = [
        write_run(tmp_path / "a", found=results(), data={"train": {"shards": "/first"}}),
        write_run(tmp_path / "b", found=other, optim={"lr": 0.5}, data={"train": {"shards": "/second"}}),
        write_run(tmp_path / "sweep" / "b", found=results()),
    ]
    subjects = read_subjects(runs)
    names = [subject.name for subject in subjects]
    assert names[0] == "a" and len(set(names)) == 3, "two of the same name"
    assert [subject.colour for subject in subjects] == [2, 1, 0], "the last has the first colour"
    (best,) = [cell for cell in score_tables(subjects)[0].rows["balanced_accuracy"] if cell.is_best]
    assert best.value == 0.97
    page = page_of(*runs)
    assert "3 runs compared" in page.words
    differences = page.words.partition("What differs")[2].partition(" keys")[0]
    assert "optim.lr 0.001 0.5 0.001" in differences and "run_name" not in differences
    assert "data.train.shards *** *** –" in differences, "what is hidden still differs"


@pytest.mark.parametrize("lines", [0, 1, 4])
def test_an_unfinished_run_has_a_page(tmp_path, lines):
    page = page_of(write_run(tmp_path / "demo", lines=lines))
    assert "Nothing was evaluated yet" in page.words
    assert (f"not finished, {64 * lines:,} of 640" in page.words) == bool(lines)
    assert ("curves" in page.ids) == bool(lines)
    assert len(page.all("circle")) >= lines, "a point alone is drawn as a dot"


def test_a_run_that_was_evaluated_at_its_start_only_is_not_judged(tmp_path):
    page = page_of(write_run(tmp_path / "demo", lines=2, found=results(samples_seen=0)))
    assert "Nothing but the start was evaluated so far." in page.words and "metrics better" not in page.words


def test_an_evaluation_has_a_page(tmp_path):
    found = results()["outcomes"]
    content = {
        "models": {"base": {"source": "a"}, "ours": {"source": "b"}},
        "outcomes": {"base": found, "ours": found},
        "baseline": "base",
        "differences": {"ours": {"zeroshot_tissue/accuracy": [0.1, 0.05, 0.15]}},
    }
    (tmp_path / "results.json").write_text(json.dumps(content))
    page = page_of(tmp_path)
    assert "2 models compared" in page.words and "ours against base: 1 of 4 metrics better" in page.words
    assert "It was not recorded." in page.words


def test_what_is_no_run_is_refused_in_one_sentence(tmp_path):
    run = write_run(tmp_path / "sweep" / "trial-000")
    for paths, message in [
        ([tmp_path / "absent"], "there is no such directory"),
        ([tmp_path / "sweep"], f"it holds runs: give {re.escape(str(run))}"),
        ([run, run], "twice"),
    ]:
        with pytest.raises(UserError, match=message):
            read_subjects(paths)
    (run / "results.json").write_text("{")
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        read_subjects([run])


@pytest.mark.parametrize("line", [b"\xff\xfe", b"null", b"[]", b"{}", b'{"samples_seen": "x"}', b"{"])
def test_a_damaged_line_of_the_log_is_said(tmp_path, line):
    run = write_run(tmp_path / "demo")
    (run / "metrics.jsonl").write_bytes(line + b"\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read .*`quiltnet check run"):
        read_subjects([run])


def test_the_page_goes_into_the_run_and_replaces_only_itself(tmp_path):
    run = write_run(tmp_path / "demo")
    for _ in range(2):  # its own page is written anew
        done = CliRunner().invoke(app, ["report", str(run)], catch_exceptions=False)
        assert done.exit_code == 0 and f"{run / 'report.html'}: 0.0" in done.stdout
    assert Page((run / "report.html").read_text()).all("h1")
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_a_file_is_replaced_only_where_it_is_said(tmp_path):
    page, notes = tmp_path / "page.html", tmp_path / "report.html"
    page.write_text(MARK)
    notes.write_text("notes of mine")
    check_report_path(page, is_own=True, overwrite=False)
    check_report_path(notes, is_own=True, overwrite=True)
    check_report_path(tmp_path / "new.html", is_own=False, overwrite=False)
    for path, is_own in [(page, False), (notes, True)]:
        with pytest.raises(UserError, match="exists already"):
            check_report_path(path, is_own=is_own, overwrite=False)
    with pytest.raises(UserError, match="is a directory"):
        check_report_path(tmp_path, is_own=False, overwrite=True)


def test_broken_samples_and_what_filters_dropped_are_counted(tmp_path):
    run = write_run(tmp_path / "demo")
    rows = [{"samples_seen": 64, "key": "smith", "reason": "unreadable_image", "samples": n} for n in (1, 2)]
    (run / "quarantine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = {"totals": {"rows": 1443, "rejected": {"filtered_subset": 460}}, "splits": {"val": {"samples": 247}}}
    (subject,) = read_subjects([run])
    page = Page(render_report([replace(subject, manifest=manifest)]))
    for said in ("broken: unreadable image 3", "rows left out: filtered subset 460", "samples of split val 247"):
        assert said in page.words
    assert "smith" not in page.text.partition("Data")[2].partition("Configuration")[0]


def test_a_long_log_is_thinned_and_keeps_its_spikes(tmp_path):
    points = [(x, 1.0 + (x % 7) / 10) for x in range(100_000)]
    points[54_321] = (54_321, 99.0)
    points[70_000] = (70_000, None)
    kept = thinned(points)
    assert len(kept) <= 240 and (54_321, 99.0) in kept and kept == sorted(kept)
    (line,) = line_chart("loss", {"a": points}, [0]).lines
    assert len(line.path) < 4000 and len(line.tips) <= 14


def test_a_value_that_was_not_finite_breaks_the_curve():
    (line,) = line_chart("loss", {"a": [(1, 1.0), (2, 2.0), (3, None), (4, 3.0)]}, [0]).lines
    assert line.path.count("M") == 2 and len(line.dots) == 1
    assert line_chart("loss", {"a": [(1, None)]}, [0]) is None


def test_ticks_are_round_and_tell_each_other_apart():
    assert round_ticks(0, 2944, 4) == [0, 1000, 2000, 3000]
    assert list(tick_labels(round_ticks(14.22, 14.31, 4)).values()) == ["14.2", "14.25", "14.3", "14.35"]
    assert list(tick_labels([0.0, 1e-5, 2e-5]).values()) == ["0", "1e-05", "2e-05"]
    assert round_ticks(3.0, 3.0, 4) == [3.0]


def test_numbers_keep_what_matters():
    assert [number(value) for value in (0.97166, 3.0, 17.5, 12345.6, None)] == ["0.972", "3", "17.5", "12,346", "–"]
    assert [signed(value) for value in (0.5, -0.5, 0.0001)] == ["+0.500", "−0.500", "0.000"]
