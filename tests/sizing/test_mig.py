import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_lib.sizing.catalog import find_gpu
from course_lib.sizing.mig import best_mig_fit, mig_fits

H100 = find_gpu("H100_80GB")


def test_a_small_model_fits_the_smallest_slice_seven_times():
    best = best_mig_fit(9, H100)
    assert best is not None
    assert (best.profile.name, best.replicas_per_gpu) == ("1g.10gb", 7)


def test_8b_in_bf16_takes_half_an_h100():
    fits = {fit.profile.name: fit.replicas_per_gpu for fit in mig_fits(23.3, H100)}
    assert fits == {
        "1g.10gb": 0,
        "1g.20gb": 0,
        "2g.20gb": 0,
        "3g.40gb": 2,
        "4g.40gb": 1,
        "7g.80gb": 1,
    }
    best = best_mig_fit(23.3, H100)
    assert best is not None
    assert best.profile.name == "3g.40gb"


def test_what_does_not_fit_the_gpu_fits_no_slice():
    assert best_mig_fit(77, H100) is None


@pytest.mark.parametrize("name", ["L4_24GB", "A10G_24GB", "L40S_48GB"])
def test_gpus_without_mig_have_no_slices(name):
    assert mig_fits(1, find_gpu(name)) == ()
    assert best_mig_fit(1, find_gpu(name)) is None


def test_a_slice_has_its_share_of_memory_and_bandwidth():
    by_name = {fit.profile.name: fit for fit in mig_fits(1, H100)}
    assert by_name["1g.10gb"].bandwidth_gb_s == 3350 / 8
    assert by_name["7g.80gb"].bandwidth_gb_s == 3350
    assert by_name["7g.80gb"].usable_gb == H100.usable_gb


@given(st.floats(0.1, 150), st.sampled_from(["A100_40GB", "H100_80GB", "H200_141GB"]))
def test_replicas_never_take_more_than_the_gpu_has(required_gb, name):
    gpu = find_gpu(name)
    for fit in mig_fits(required_gb, gpu):
        assert fit.fits == (fit.replicas_per_gpu > 0)
        assert fit.replicas_per_gpu * required_gb <= gpu.memory_gb


@pytest.mark.parametrize("bad", [0, -1, "9", True, float("nan")])
def test_a_bad_size_is_refused(bad):
    with pytest.raises(ValueError, match="required_gb must be a number above 0"):
        mig_fits(bad, H100)
