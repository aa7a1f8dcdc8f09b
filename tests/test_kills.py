"""A run that is killed at any moment, again and again, ends as if nothing had happened."""

import random

import pytest

TASKS = ["mlp", "batchnorm", "albert"]


# SIGKILL


def killed(jobs, random, folder, task, when):
    """Runs until it is killed, at a random moment of the kind `when`; or to its end, if that came
    first. Returns the job, which is over."""
    if when == "compile":  # in one of the two that a resumed run certainly has
        job = jobs.start(folder, "--task", task, "--no-cache")
        job.strike(9, "compile", random.randint(1, 2), random.uniform(0, 0.3))
    elif when == "disk":  # some wait for the disk, which is most likely part of a save
        job = jobs.start(folder, "--task", task, "--slow-disk", 0.03)
        job.strike(9, "disk", random.randint(5, 40), random.uniform(0, 0.05))
    elif when == "step":
        job = jobs.start(folder, "--task", task)
        job.strike(9, "step", random.randint(1, 12), random.uniform(0, 0.02))
    else:
        job = jobs.start(folder, "--task", task)
        job.strike(9, None, delay=random.uniform(0, 1.5))
    job.wait()
    return job


def live(jobs, random, folder, task, kills):
    """A run that is killed at each of the moments `kills`, and then left in peace. Returns its
    result, and those moments that it was over too soon for."""
    left = list(kills)
    while left:
        job = killed(jobs, random, folder, task, left[0])
        if job.code == 0:
            return job.result, left
        assert job.code == -9, job.err
        left.pop(0)
    job = jobs.run(folder, "--task", task)
    assert job.code == 0, job.err
    return job.result, left


def assert_survives(jobs, whole, tmp_path, task, kills, seed):
    """That all of `kills` hit, in as many lives as it takes, and that none of them shows."""
    generator = random.Random(f"{task} {seed}")
    generator.shuffle(kills)
    for number in range(len(kills) + 1):
        result, kills = live(jobs, generator, tmp_path / str(number), task, kills)
        assert result == whole(task)
        if not kills:
            return
    raise AssertionError(f"The run was always over before it was killed: {kills}")


@pytest.mark.parametrize(
    "task", [TASKS[0], *(pytest.param(task, marks=pytest.mark.slow) for task in TASKS[1:])]
)
def test_killed_again_and_again(jobs, whole, tmp_path, task):
    assert_survives(jobs, whole, tmp_path, task, ["step", "disk", "compile", "time"], 0)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("task", TASKS)
def test_killed_a_hundred_times(jobs, whole, tmp_path, task, seed):
    kills = ["step", "disk", "compile", "time"]
    assert_survives(jobs, whole, tmp_path, task, kills, seed + 1)


# SIGTERM

PHASES = [  # a point of the run, and the step that has been taken by then; `None`: none was begun
    ("prepare", -1, None),
    ("setup", -1, None),
    ("first", -1, None),  # while the first batch is waited for
    ("compile", -1, 0),
    ("sanity", 0, 0),
    ("step", 7, 7),
    ("data", 9, 9),  # while a batch is waited for
    ("validation", 8, 8),
    ("validated", 15, 15),
    ("disk", 20, None),  # while a save is under way
    ("epoch", 11, 11),
    ("end", -1, None),
]


def assert_terminated_and_resumed(jobs, whole, folder, task, where, step, saved, name="SIGTERM"):
    options = (folder, "--task", task)
    cut = jobs.run(*options, "--signal", name, "--step", step, "--where", where)
    assert cut.code == {"SIGTERM": 143, "SIGINT": 130}[name], cut.err
    if saved is not None:
        assert cut.saved_step() == saved
    resumed = jobs.run(*options)
    assert resumed.code == 0, resumed.err
    if where == "end":  # where a last one may be saved that nothing follows
        kept = resumed.result["kept"]
        resumed.result["kept"] = [name for name in kept if not name.startswith("interrupted")]
    assert resumed.result == whole(task)
    if saved is not None:  # no step is taken twice
        assert f"step {saved + 1}" == next(s for s in resumed.said if s.startswith("step"))


def task_for(number, where):
    """One after the other, and the slowest to start in two phases only."""
    return "albert" if where in ("step", "validated") else ("mlp", "batchnorm")[number % 2]


@pytest.mark.long
@pytest.mark.parametrize(
    ("task", "where", "step", "saved"),
    [pytest.param(task_for(i, p[0]), *p, id=p[0]) for i, p in enumerate(PHASES)],
)
def test_terminated_in_every_phase(jobs, whole, tmp_path, task, where, step, saved):
    assert_terminated_and_resumed(jobs, whole, tmp_path, task, where, step, saved)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(("where", "step", "saved"), PHASES, ids=[p[0] for p in PHASES])
def test_any_task_terminated_in_every_phase(jobs, whole, tmp_path, task, where, step, saved, name):
    assert_terminated_and_resumed(jobs, whole, tmp_path, task, where, step, saved, name)
