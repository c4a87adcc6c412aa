"""Lists of any length, read one record after the other."""

import json
import os

import pytest

from data.files import InputError, is_list, read_json, read_tensors, stream_list


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


@pytest.mark.parametrize("content, message", [
    ("[" * 100_000, "nested too deeply"), ('[{"a": ' + "[" * 100_000, "record 0: its lists and"),
    ('{"a": ' * 100_000, "nested too deeply"), ('[{"a": 1}, {"a": ' + "9" * 5000 + "}]",
                                                "record 1: a number is too long"),
    ('{"a": ' + "9" * 5000 + "}", "a number is too long"),
    ('[{"a": 1}]\n[{"a": 2}]', "goes on after the end of its list"),
    ("image,caption\na.jpg,a dog\n", "is no json .* give a json list, json with one record a line"),
    ("", "is empty; give a file with records"),
    (b"\x1f\x8b\x08\x00" + bytes(range(256)), "is no json"),
    ('{"a": 1}\n{"a": 2\n{"a": 3}\n', "record 1: no valid json"),
    (b'[{"a": "\xff"}]', "is no UTF-8 text"), ('[{"a": 1}', "not valid json"),
    ('[{"a": 1}]'.encode("utf-16"), "is no UTF-8 text; save it as UTF-8")])
def test_what_is_no_sound_json_is_one_sentence(tmp_path, content, message):
    path = tmp_path / "p.json"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=message) as error:
        list(stream_list(path)) if is_list(path) else read_json(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_one_record_a_line_is_recognised_whatever_the_name_ends_with(tmp_path):
    lines = write_json(tmp_path / "lines.json", '{"a": 1}\n{"a": [2]}\n')
    assert is_list(lines) and list(stream_list(lines)) == [{"a": 1}, {"a": [2]}]
    for name, text in (("one.json", '{"a": 1}\n'), ("several.json", '{\n"a": 1,\n"b": 2}\n')):
        assert not is_list(write_json(tmp_path / name, text))
    assert is_list(write_json(tmp_path / "one.jsonl", '{"a": 1}\n'))
    marked = write_json(tmp_path / "marked.json", '\ufeff[{"a": 1}]')
    assert is_list(marked) and list(stream_list(marked)) == [{"a": 1}]
    assert list(stream_list(write_json(tmp_path / "l.json", "[[1], [2]]"))) == [[1], [2]]


def test_half_a_character_becomes_a_question_mark(tmp_path):
    """Such a text could be neither cut into tokens nor printed. Whole ones stay as they are."""
    content = '[{"a": "x\\ud83d", "\\uDE00": ["\\ud83d\\ude00 \\u00e9"]}]'
    expected = {"a": "x?", "?": ["\U0001f600 é"]}
    path = write_json(tmp_path / "p.json", content)
    assert list(stream_list(path)) == [expected] == read_json(path)


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "p.json")
    for path in (tmp_path / "p.json", "/dev/zero", tmp_path):
        for read in (read_json, is_list, read_tensors, lambda p: list(stream_list(p))):
            with pytest.raises(InputError, match="no regular file|is a folder"):
                read(path)
