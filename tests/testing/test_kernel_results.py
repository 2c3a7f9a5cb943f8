import json

from rlm_mhc.testing.kernel_results import SAME, merged


def test_a_part_is_added_to_what_was_measured_of_the_same_kernels(tmp_path):
    file = tmp_path / "result.json"
    earlier = dict.fromkeys(SAME, 1) | {"tests": {"passed": 3}, "sizes": ["a"]}
    file.write_text(json.dumps(earlier))
    later = dict.fromkeys(SAME, 1) | {"tests": {}, "sizes": []}
    assert merged(later, file) == earlier
    assert merged(later | {"tests": {"passed": 4}}, file)["tests"] == {"passed": 4}
    for key in SAME:
        assert merged(later | {key: 2}, file) == later | {key: 2}
