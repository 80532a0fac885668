"""Chips by name, chips from a file, and what their links cost."""

import json

import pytest

from tpjax.errors import ConfigError
from tpjax.hardware import HARDWARE, load_hardware, parse_hardware
from tpjax.interconnect import ICI, Measured, NVLink, torus

NVLINK = NVLink(300e9, latency_us=6.0, peer_us=0.5, ring_us=12.0, fraction=0.75)


def test_every_chip_of_the_table_has_a_source_and_sane_figures():
    assert list(HARDWARE) == [
        "a100-80gb",
        "h100-sxm",
        "h200",
        "b200",
        "l40s",
        "v4",
        "v5e",
        "v5p",
        "v6e",
        "tpu7x",
    ]
    for chip in HARDWARE.values():
        assert "data sheet" in chip.source or "Google Cloud" in chip.source
        assert 16e9 <= chip.memory_bytes <= 200e9
        assert 100 < chip.flops / chip.bandwidth_bytes_s < 700  # the ridge of the roofline, FLOPs a byte
        assert 0 < chip.efficiency.weights <= 1 and 0 < chip.efficiency.compute <= 1


@pytest.mark.parametrize(
    ("text", "name", "chips"),
    [
        ("h100:8", "h100-sxm", 8),
        ("h100-sxm:2", "h100-sxm", 2),
        ("a100", "a100-80gb", 1),
        ("v5e:16", "v5e", 16),
        ("v5e:2x4", "v5e", 8),
        ("v5p:2x2x1", "v5p", 4),
    ],
)
def test_hardware_is_a_name_and_a_count(text, name, chips):
    assert parse_hardware(text) == (HARDWARE[name], chips)


def test_unknown_hardware_lists_the_known():
    with pytest.raises(ConfigError, match=r"'h300' is not known; known are a100, h100, a100-80gb, .*tpu7x"):
        parse_hardware("h300:8")


@pytest.mark.parametrize(
    "count", ["0", "-1", "nan", "1.5", "", "٣", "2x4", pytest.param("9" * 5000, id="5000 digits")]
)
def test_a_count_is_a_whole_number(count):
    with pytest.raises(ConfigError, match="not a whole number of chips"):
        parse_hardware(f"h100:{count}")


def test_a_count_has_an_end():
    with pytest.raises(ConfigError, match="1000000 chips are over 65536"):
        parse_hardware("h100:1000000")
    with pytest.raises(ConfigError, match=r"v5e:0x4: '0x4' is not a whole number of chips"):
        parse_hardware("v5e:0x4")


# --- files -------------------------------------------------------------------------------------------------


def test_a_file_adds_chips_in_either_format(tmp_path):
    toml = tmp_path / "chips.toml"
    toml.write_text(
        """
        [mine]
        memory_gb = 24
        bandwidth_gb_s = 1000
        bf16_tflops = 100
        link = "pcie"
        link_gb_s = 25
        [slow]
        like = "h100"
        bandwidth_gb_s = 2000
        efficiency = {weights = 0.5, layer_us = 0}
        """
    )
    mine, chips = parse_hardware("mine:4", toml)
    assert chips == 4
    assert (mine.memory_bytes, mine.bandwidth_bytes_s, mine.flops) == (24e9, 1e12, 100e12)
    assert mine.interconnect == NVLink(25e9, latency_us=15.0, ring_us=20.0, direct=False)
    slow, _ = parse_hardware("slow", toml)
    assert slow.bandwidth_bytes_s == 2e12 and slow.flops == HARDWARE["h100-sxm"].flops
    assert (slow.efficiency.weights, slow.efficiency.layer_us, slow.efficiency.cache) == (0.5, 0, 0.8)
    data = tmp_path / "chips.json"
    data.write_text(json.dumps({"torus": {"like": "v5e", "link": "ici-3d", "link_gb_s": 90}}))
    assert parse_hardware("torus", data)[0].interconnect == ICI(90e9, 3, 4)


@pytest.mark.parametrize(
    ("chip", "message"),
    [
        ({"like": "h300"}, r"like='h300' is not known"),
        ({"like": ["h100"]}, r"is not known; known are a100-80gb"),
        ({"memory_gb": 24}, r"'bandwidth_gb_s' is missing"),
        ({"like": "h100", "memory": 24}, r"unknown field 'memory'"),
        ({"like": "h100", "memory_gb": float("nan")}, r"memory_gb=nan is not a positive number"),
        ({"like": "h100", "memory_gb": 0}, r"memory_gb=0 is not a positive number"),
        ({"like": "h100", "bandwidth_gb_s": 1e-320}, r"=1e-320 is not a positive number, 1e-09 to 1e\+15"),
        ({"like": "h100", "link": "wifi"}, r"link='wifi' is not known; known are nvlink"),
        ({"like": "h100", "efficiency": {"speed": 1}}, r"unknown efficiency 'speed'"),
        ({"like": "h100", "efficiency": {"weights": -1}}, r"weights=-1 is not a positive number"),
    ],
)
def test_a_wrong_file_is_one_line(tmp_path, chip, message):
    file = tmp_path / "chips.json"
    file.write_text(json.dumps({"mine": chip}))
    with pytest.raises(ConfigError, match=message) as caught:
        load_hardware(file)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_no_file(tmp_path):
    with pytest.raises(ConfigError, match="No such file"):
        load_hardware(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("[")
    with pytest.raises(ConfigError, match="neither JSON nor TOML"):
        load_hardware(tmp_path / "bad.toml")


# --- all-reduces -------------------------------------------------------------------------------------------


def test_one_chip_sums_nothing():
    for links in (NVLINK, ICI(45e9, 2, 16), Measured(((1024.0, 1e-5),))):
        assert links.all_reduce_s(1, 1e6) == 0


def test_small_messages_go_one_shot():
    # latency, half a microsecond for each of six more peers, and seven messages at 225 GB/s
    assert NVLINK.all_reduce_s(8, 8192) == pytest.approx(6e-6 + 6 * 0.5e-6 + 7 * 8192 / 225e9)


def test_middle_messages_go_two_shot_and_large_ones_round_a_ring():
    moved = 2 * 7 / 8 * 2**20 / 225e9
    assert NVLINK.all_reduce_s(8, 2**20) == pytest.approx(1.5 * 9e-6 + moved)
    assert NVLINK.all_reduce_s(8, 2**26) == pytest.approx(12e-6 + 14e-6 + 64 * moved)


def test_three_gpus_have_only_the_ring():
    assert NVLINK.all_reduce_s(3, 8192) == pytest.approx(12e-6 + 4e-6 + 4 / 3 * 8192 / 225e9)


def test_beyond_a_group_the_network_counts():
    inside = NVLINK.all_reduce_s(8, 8192)
    between = 2 * 10e-6 + 2 / 2 * 8192 / 8 / (0.75 * 50e9)
    assert NVLINK.all_reduce_s(16, 8192) == pytest.approx(inside + between)


def test_a_torus_reduces_along_all_axes():
    links = ICI(45e9, 2, 16, hop_us=1.0, fraction=1.0)
    # 4×4, open: two lines of three hops there and back; both carry 45 GB/s
    assert links.all_reduce_s(16, 1e6) == pytest.approx(2 * 6e-6 + 2 * 15 / 16 * 1e6 / 90e9)
    # 16×16, closed: eight hops each way, and both directions of both rings
    assert links.all_reduce_s(256, 1e6) == pytest.approx(2 * 16e-6 + 2 * 255 / 256 * 1e6 / 180e9)


def test_slices_are_as_square_as_they_can_be():
    assert [torus(n, 2) for n in (1, 2, 4, 8, 16, 32)] == [(1, 1), (1, 2), (2, 2), (2, 4), (4, 4), (4, 8)]
    assert [torus(n, 3) for n in (4, 8, 16, 64)] == [(1, 2, 2), (2, 2, 2), (2, 2, 4), (4, 4, 4)]
    assert torus(5, 2) == (1, 5)


@pytest.mark.parametrize("links", [NVLINK, ICI(45e9, 2, 16), ICI(90e9, 3, 4)])
@pytest.mark.parametrize("chips", [2, 3, 4, 8, 16])
def test_larger_messages_never_take_less_time(links, chips):
    times = [links.all_reduce_s(chips, 2**power) for power in range(8, 30)]
    assert times == sorted(times)


def test_measured_times_are_interpolated():
    links = Measured(((1000.0, 1e-5), (2000.0, 3e-5)))
    assert links.all_reduce_s(2, 10) == 1e-5
    assert links.all_reduce_s(2, 1500) == pytest.approx(2e-5)
    assert links.all_reduce_s(2, 8000) == pytest.approx(12e-5)
