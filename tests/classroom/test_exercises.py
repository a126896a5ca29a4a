"""Every exercise: right answers in another style pass, wrong ones fail, stubs cost nothing else."""

import importlib
import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from course_lib.classroom.checks import CheckFailed, check, find_exercise, hint, reference
from course_lib.classroom.parts import PARTS, load_object, part

NOTEBOOKS = sorted(path.stem[-2:] for path in Path(__file__).parent.glob("answers_*.py"))
ANSWERS = [importlib.import_module(f"tests.classroom.answers_{name}") for name in NOTEBOOKS]
EXERCISES = [
    exercise
    for name in NOTEBOOKS
    for exercise in importlib.import_module(f"course_lib.classroom.exercises.{name}").EXERCISES
]
RIGHT = [
    (e, answer) for module in ANSWERS for e, answers in module.RIGHT.items() for answer in answers
]
WRONG = [
    (e, answer) for module in ANSWERS for e, answers in module.WRONG.items() for answer in answers
]


def _name(value: object) -> str:
    return getattr(value, "__name__", str(value))


@pytest.fixture(autouse=True)
def own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("COURSE_PARTS_DIR", str(tmp_path))
    yield tmp_path


def test_every_exercise_has_two_right_and_five_wrong_answers() -> None:
    for exercise in EXERCISES:
        assert sum(e == exercise.id for e, _ in RIGHT) >= 2, exercise.id
        assert sum(e == exercise.id for e, _ in WRONG) >= 5, exercise.id


@pytest.mark.parametrize(("exercise", "answer"), RIGHT, ids=_name)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_right_answer_earns_all_points(exercise: str, answer: object, seed: int) -> None:
    assert check(exercise, answer, seed=seed) == find_exercise(exercise).points


@pytest.mark.parametrize(("exercise", "answer"), WRONG, ids=_name)
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_a_wrong_answer_fails_with_the_first_difference_and_a_hint(
    exercise: str, answer: object, seed: int, own_parts: Path
) -> None:
    with pytest.raises(CheckFailed) as failure:
        check(exercise, answer, seed=seed)
    message = str(failure.value)
    assert "First difference: " in message and "Hint: " in message
    assert f"seed={seed}" in message
    assert not list(own_parts.iterdir())


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_the_reference_is_not_an_answer(exercise, tmp_path: Path) -> None:
    target = load_object(exercise.reference)
    with pytest.raises(CheckFailed, match="course's own"):
        check(exercise.id, target)
    module, name = exercise.reference.split(":")
    for how, source in {
        "wraps": f"from {module} import {name} as theirs\n"
        "def answer(*args, **kwargs):\n    return theirs(*args, **kwargs)\n",
        "imports inside": "def answer(*args, **kwargs):\n"
        f"    from {module} import {name} as theirs\n    return theirs(*args, **kwargs)\n",
        "finds it at run time": "import importlib\n\ndef answer(*args, **kwargs):\n"
        f"    return getattr(importlib.import_module({module!r}), {name!r})(*args, **kwargs)\n",
    }.items():
        path = tmp_path / "student.py"
        path.write_text(source)
        with pytest.raises(CheckFailed):
            check(exercise.id, _load(path, "answer"))
            pytest.fail(how)
    if isinstance(target, type):
        with pytest.raises(CheckFailed, match="derives from"):
            check(exercise.id, type("Mine", (target,), {}))


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_a_copy_of_the_reference_is_not_an_answer(exercise, tmp_path: Path) -> None:
    module, name = exercise.reference.split(":")
    source = Path(importlib.import_module(module).__file__ or "").read_text()
    path = tmp_path / "copied.py"
    source = re.sub(rf"\b{name}\b", "Mine", source)
    source = re.sub(r"\b_schedule_running\b", "_keep", source)
    source = re.sub(r"(\w+): list\[\w+\] = \[\]", r"\1 = []", source)  # without annotations
    source = re.sub(r"\b(start|lengths|total)\b", r"my_\1", source)  # other names, same program
    path.write_text(re.sub(r'""".*?"""', '"""Mine."""', source, flags=re.DOTALL))
    with pytest.raises(CheckFailed, match="word by word"):
        check(exercise.id, _load(path, "Mine"))


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_an_unsolved_exercise_says_so_and_earns_nothing(exercise, tmp_path: Path, capsys) -> None:
    target = load_object(exercise.reference)
    stub = "    # YOUR CODE HERE\n    raise NotImplementedError()\n"
    if isinstance(target, type):
        base = target.__mro__[1]
        method = next(n for n, m in vars(target).items() if n[0] != "_" and callable(m))
        source = f"from {base.__module__} import {base.__name__}\n\n\n"
        source += f"class Mine({base.__name__}):\n    def {method}(self, *args):\n    {stub}"
        source = source.replace("\n    raise", "\n        raise")
    else:
        source = f"def Mine(*args, **kwargs):\n{stub}"
    path = tmp_path / "stub.py"
    path.write_text(source)
    assert check(exercise.id, _load(path, "Mine")) == 0
    assert f"Exercise {exercise.id} is not implemented yet" in capsys.readouterr().out


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda e: e.id)
def test_hints_lead_to_the_reference(exercise, capsys) -> None:
    for number in range(1, len(exercise.hints) + 1):
        hint(exercise.id, number)
    assert f'reference("{exercise.id}")' in capsys.readouterr().out
    reference(exercise.id)
    assert exercise.reference.split(":")[1] in capsys.readouterr().out
    with pytest.raises(ValueError, match="hints 1 to"):
        hint(exercise.id, len(exercise.hints) + 1)


def test_a_part_that_passes_is_used_from_then_on(own_parts: Path) -> None:
    mine = next(answer for e, answer in RIGHT if e == "A1.2")
    assert part("scheduler").__module__ == "course_lib.engine.scheduler"
    check("A1.2", mine)
    saved = part("scheduler")
    assert saved.__name__ == mine.__name__ and saved is not mine
    assert (own_parts / "scheduler.py").read_text().startswith("# The scheduler of your own engine")


def test_a_saved_part_that_no_longer_runs_says_what_to_do(own_parts: Path) -> None:
    (own_parts / "scheduler.py").write_text("PART = undefined\n")
    with pytest.raises(ValueError, match="mend it, or delete it"):
        part("scheduler")


def test_unknown_names_list_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"A1\.1, A1\.2"):
        check("A1.9", print)
    with pytest.raises(ValueError, match="'Z9'"):
        check("Z9.1", print)
    with pytest.raises(ValueError, match=", ".join(p.name for p in PARTS)):
        part("engine")


def test_code_that_raises_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "raises.py"
    path.write_text("def answer(lengths, slots, continuous):\n    return lengths[99]\n")
    with pytest.raises(CheckFailed, match=r"IndexError.*return lengths\[99\]"):
        check("A1.1", _load(path, "answer"))


def _load(path: Path, name: str):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return getattr(module, name)
