from data_pipelines.prepare.bad_examples import BadExamples


def test_bad_examples_are_counted_by_reason_without_values() -> None:
    bad = BadExamples()
    for line in range(30):
        bad.add(f"a.csv, line {line}", f"label 'x{line}' is not one of neg, pos")
    bad.add("b.csv, line 1", "not UTF-8: byte 0xff at character 12")
    bad.merge([("c.csv, line 9", "the text is empty")], {"the text is empty": 40})
    assert len(bad) == 71 and len(bad.first) == 20 and bad.first[0][0] == "a.csv, line 0"
    assert bad.by_count() == [
        ("the text is empty", 40),
        ("label ... is not one of neg, pos", 30),
        ("not UTF-8: byte ... at character ...", 1),
    ]
