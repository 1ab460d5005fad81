import pytest

from fastattn_compile.kernels.dispatch import chosen_kernels, give_way, recorded_kernels, select, use_kernels

CAN, CANNOT = (lambda: ""), (lambda: "no compiler was found")


def test_auto_takes_the_first_that_can() -> None:
    assert select("k", {"triton": CANNOT, "cpp": CAN}) == "cpp"
    assert select("k", {"cpp": CANNOT}) == "aten"
    assert select("k", {}) == "aten"


def test_an_explicit_choice_never_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    with use_kernels("cpp"):
        assert select("k", {"cpp": CAN}) == "cpp"
        with pytest.raises(RuntimeError, match=r"fma forward: kernels 'cpp'.*no compiler was found"):
            select("fma forward", {"cpp": CANNOT})
        with pytest.raises(RuntimeError, match="there is no cpp implementation"):
            select("k", {"triton": CAN})
    monkeypatch.setenv("FASTATTN_KERNELS", "aten")
    assert select("k", {"cpp": CAN}) == "aten"


def test_unknown_names_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="one of auto, aten, cpp, triton"), use_kernels("cuda"):
        pass
    monkeypatch.setenv("FASTATTN_KERNELS", "fast")
    with pytest.raises(ValueError, match="unknown kernels 'fast'"):
        chosen_kernels()


def test_what_ran_is_recorded() -> None:
    with recorded_kernels() as outer:
        select("fma forward", {"cpp": CAN})
        with recorded_kernels() as inner:
            select("window forward", {"cpp": CANNOT})
    select("fma backward", {"cpp": CAN})
    assert outer == {"fma forward": "cpp", "window forward": "aten"}
    assert inner == {"window forward": "aten"}


def test_giving_way_is_recorded_unless_the_user_chose() -> None:
    with recorded_kernels() as ran:
        give_way("fma forward", select("fma forward", {"cpp": CAN}), "a NaN")
    assert ran == {"fma forward": "aten"}
    with use_kernels("cpp"), pytest.raises(RuntimeError, match=r"'cpp' were chosen.*a NaN"):
        give_way("fma forward", select("fma forward", {"cpp": CAN}), "a NaN")
