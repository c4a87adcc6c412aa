"""Lists of any length, read one record after the other."""

import json

import pytest

from data.files import InputError, stream_list


def write_json(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_a_list_is_streamed(tmp_path):
    records = [{"image": f"{i}.jpg", "caption": "é [}\" " * (i % 40)} for i in range(40000)]
    path = write_json(tmp_path / "p.json", records)
    assert path.stat().st_size > 3 << 20 and list(stream_list(path)) == records
    lines = write_json(tmp_path / "p.jsonl", "\n".join(map(json.dumps, records[:5])))
    assert list(stream_list(lines)) == records[:5]
    assert list(stream_list(write_json(tmp_path / "e.json", "[ ]"))) == []
    cut = write_json(tmp_path / "c.json", path.read_text()[:2_000_000])
    with pytest.raises(InputError, match="c.json is not valid json"):
        list(stream_list(cut))
