"""The serving study: every job once, in order, on the GPUs there are; what is left is told."""

import json
import threading

import pytest

from benchmarks.serving import drive, study
from benchmarks.serving.load import Level
from benchmarks.serving.study import FAILED, LEFT, PARTS, SEARCH, Job, Study, load

SHORT = load(5, 10, 20, "short/closed:4", "short/open:1")
FAST = [Job("m", side, SHORT) for side in ("stock", "tangram")]


class Runs:
    """Stands in for the processes: writes the cells that it is told to play."""

    def __init__(self, out, code=0, rate=0.3):
        self.out, self.code, self.rate = out, code, rate
        self.commands, self.gpus = [], []
        self._lock = threading.Lock()

    def __call__(self, job, command, gpu):
        options = dict(zip(command[::2], command[1::2], strict=False))
        with self._lock:
            self.commands.append(options)
            self.gpus.append(gpu)
            if self.code == 0:
                self.write(job, command)
        return self.code

    def write(self, job, command):
        args = drive.parser().parse_args(command)
        for workload, level in args.cells:
            line = drive.about(job.side, args, workload, level)
            line |= {"rate_per_s": self.rate} if level.kind == "search" else {}
            with self.out.open("a") as file:
                file.write(json.dumps(line) + "\n")


def run(jobs, runs, *options, gpus=("0",), clock=None):
    args = study._parser().parse_args(["--out", str(runs.out), *options])
    made = Study(jobs, args, runs, **({"clock": clock} if clock else {}))
    workers = [threading.Thread(target=made.work, args=(gpu,)) for gpu in gpus]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(10)
        assert not worker.is_alive()
    return made


@pytest.fixture
def out(tmp_path):
    return tmp_path / "out.jsonl"


def test_every_cell_is_run_once_and_not_again(out):
    runs = Runs(out)
    made = run(FAST, runs, gpus=("0", "1"))
    assert (made.failed, made.left) == (0, 0)
    assert sorted(c["--sides"] for c in runs.commands) == ["stock", "tangram"]
    assert {c["--cells"] for c in runs.commands} == {"short/closed:4,short/open:1"}
    again = Runs(out)
    run(FAST, again)
    assert again.commands == []


def test_a_job_takes_up_where_its_file_ends(out):
    Runs(out).write(FAST[0], [*study._options(FAST[0], ["short/closed:4"]), "--out", str(out)])
    runs = Runs(out)
    run(FAST, runs)
    assert [c["--cells"] for c in runs.commands] == ["short/open:1", "short/closed:4,short/open:1"]


def test_another_ratio_is_another_job_of_compression_only(out):
    run(FAST, Runs(out))
    runs = Runs(out)
    run([Job("m", side, SHORT, 0.5) for side in ("stock", "tangram")], runs)
    assert [(c["--sides"], c["--ratio"]) for c in runs.commands] == [("tangram", "0.5")]


def test_a_rate_that_stock_sustains_is_waited_for(out):
    jobs = [
        Job("m", "tangram", load(5, 5, 20, "mid/open:stock")),
        Job("m", "stock", load(5, 5, 20, "mid/search:0.2")),
    ]
    runs = Runs(out, rate=0.283)
    made = run(jobs, runs, gpus=("0", "1", "2"))
    assert [c["--cells"] for c in runs.commands] == ["mid/search:0.2", "mid/open:0.283"]
    assert (made.failed, made.left) == (0, 0)
    run(jobs, again := Runs(out))
    assert again.commands == []


def test_where_stock_sustains_no_rate_the_job_is_told_and_not_left(out, capsys):
    """It was left for ever: the same command was to be run again, and found nothing to do."""
    jobs = [
        Job("m", "tangram", load(5, 5, 20, "mid/open:stock", "short/closed:4")),
        Job("m", "stock", load(5, 5, 20, "mid/search:0.2")),
    ]
    runs = Runs(out, rate=None)
    made = run(jobs, runs, gpus=("0", "1"))
    assert [c["--cells"] for c in runs.commands] == ["mid/search:0.2", "short/closed:4"]
    assert (made.failed, made.left) == (0, 0)
    told = "stock sustains no rate that was tried: mid/open:stock is not played"
    assert capsys.readouterr().out.count(told) == 1
    made = run(jobs, again := Runs(out))
    assert again.commands == [] and (made.failed, made.left) == (0, 0)
    assert capsys.readouterr().out.count(told) == 1


def test_the_list_tells_what_is_not_played(out, capsys):
    search, _, at_stocks_rate = PARTS["saturation"]
    arguments = ["--list", "--parts", "saturation", "--out", str(out)]
    for rate, told in ((None, "stock sustains no rate that was tried"), (0.2, "mid/open:0.2")):
        cells = [*study._options(search, search.load.cells), "--out", str(out)]
        Runs(out, rate=rate).write(search, cells)
        assert study.main(arguments) == 0
        assert told in capsys.readouterr().out.splitlines()[-1]
    assert at_stocks_rate.load.cells == ("mid/open:stock",)


def test_a_rate_that_nobody_finds_leaves_the_job(out):
    made = run([Job("m", "tangram", load(5, 5, 20, "mid/open:stock"))], Runs(out))
    assert (made.failed, made.left) == (0, 1)


def test_nothing_is_begun_that_could_not_end_in_time(out):
    ticks = iter(range(0, 10_000, 50))
    runs = Runs(out)
    made = run(
        FAST, runs, "--time-limit-s", "250", "--start-s", "150", clock=lambda: float(next(ticks))
    )
    # A job takes 150 s to start and 32 for a cell; the clock is read three times for the first.
    assert len(runs.commands) == 1 and made.left == 1
    assert float(runs.commands[0]["--time-limit-s"]) < 250


@pytest.mark.parametrize(("code", "failed", "left"), [(1, 2, 0), (3, 0, 2), (FAILED, 2, 0)])
def test_what_a_job_ends_with_is_told(out, code, failed, left):
    made = run(FAST, Runs(out, code=code))
    assert (made.failed, made.left) == (failed, left)
    assert LEFT == 3


def test_a_job_that_cannot_be_run_fails_and_the_others_go_on(out):
    class Broken(Runs):
        def __call__(self, job, command, gpu):
            if job.side == "stock":
                raise OSError("no such command")
            return super().__call__(job, command, gpu)

    runs = Broken(out)
    made = run(FAST, runs)
    assert made.failed == 1 and [c["--sides"] for c in runs.commands] == ["tangram"]


def test_without_a_gpu_nothing_is_begun_unless_some_are_named(out, monkeypatch, tmp_path, capsys):
    """GPU 0 was taken to be there, and every job failed after its server had not come up."""
    runs = Runs(out)
    monkeypatch.setattr(Study, "_run_process", lambda self, *job: runs(*job))
    monkeypatch.setattr(drive, "output", lambda *command: None)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    arguments = ["--parts", "agent", "--out", str(out), "--logs", str(tmp_path)]
    assert study.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no GPU" in line and "--gpus" in line and runs.commands == []
    assert study.main([*arguments, "--gpus", "7"]) == 0
    assert set(runs.gpus) == {"7"}


def test_a_job_that_failed_names_its_logs(out, tmp_path, capsys):
    run(FAST, Runs(out, code=1), "--logs", str(tmp_path))
    first = capsys.readouterr().out.splitlines()[0]
    assert first.endswith(f"{FAST[0].name}: exit 1, see {tmp_path / FAST[0].name}")


def test_shares_that_are_not_there_are_told_before_a_job_begins(out, monkeypatch, capsys):
    monkeypatch.setattr(Study, "_run_process", lambda self, *job: pytest.fail("began a job"))
    with pytest.raises(SystemExit) as stop:
        study.main(["--retention", "/nope", "--out", str(out), "--gpus", "7"])
    assert stop.value.code == 2
    assert "--retention: /nope: there is no such file" in capsys.readouterr().err


def test_the_jobs_are_cells_that_the_driver_knows():
    names = [job.name for jobs in PARTS.values() for job in jobs]
    assert len(set(names)) == len(names)
    for jobs in PARTS.values():
        for job in jobs:
            for cell in job.load.cells:
                if not cell.endswith(":stock"):
                    workload, level = study.drive.cell_of(cell)
                    assert isinstance(level, Level) and workload
            assert job.side in study.drive.SIDES
    assert any(job.load == SEARCH and job.side == "stock" for job in PARTS["saturation"])
