"""Right and wrong answers in the words of models, judged by hand before the rules were."""

import importlib.util

import pytest

from rl.rewards import rewards_from
from tests.rl.rewards.cases import OPTIONS, judged, question

CASES = [
    ("number", "1.2 km", "1.2 KM|1.2 Kilometers|1.2公里|1200米|1.2 千米。|6/5 km|1 km 200 m|1 km and 200 m",
     "1.2 MM|2 km 200 m|1 km 1 km|1 m 1 km|1 km 200 s|1 km 2000 m|1.2 kg 千米|不是1.2公里|1.2 km 或 1.3 km"),
    ("number", "90 km/h", "90公里/小时|90 km·h⁻¹|25 m/s|90 Km/h|90 km per hour", "90 m/s|90公里|90"),
    ("number", "50%", r"50\%|\boxed{50\%}|50 per cent|0.5|1/2|50%", "50|0.05|5%|0.5 m"),
    ("number", "0.5", r"\frac{1}{2}|½|50%|1/2|.5", "50|0.5 m|5%|50 s"),
    ("number", "25 °C", r"25^\circ C|25^{\circ}\text{C}|25 degree Celsius|25 deg C|25摄氏度|25 ° C|77 °F|25 Celsius",
     "25|25 °F|25°|25 C|26摄氏度"),
    ("number", "90°", r"90^\circ|$90^{\circ}$|90度|90 Degrees|90 degrees", "90|9°|90 °C"),
    ("number", "$5", r"US$5|USD 5|\$5|$ 5|5美元|5 dollars", "5|$6|US$50|€5"),
    ("number", "90 s", "90秒|1.5分钟|90 Seconds|1 min 30 s|1 minute and 30 seconds|1分钟30秒",
     "1 min 31 s|90|90分钟|30 s 1 min|1 min 90 s"),
    ("number", "3 m^2", "3平方米|3 m²|3 ㎡", "3米|3立方米|3 m"),
    ("number", "5 kg", "5 KG|5 kilos|5公斤|5千克|5 Kg", "5克|5 g|5"),
    ("temporal_iou", "3.5 - 10",
     "从3.5秒到10秒|3.5秒至10秒。|3.5 secs - 10 secs|3.5~10|3.5s → 10s|The answer is 3.5 - 10|3.5 sec. - 10 sec.",
     "3.5|不是3.5秒到10秒|3.5分钟到10分钟|The answer is not 3.5 - 10|3.5~10~20"),
    ("seconds", "65", "65秒|1分5秒|1分05秒|65 秒钟|1分钟5秒", "65分钟|65分|6 5 秒|不是65秒|1分15秒|65毫秒"),
    ("iou", "[100, 100, 200, 200]",
     "<box>[100, 100, 200, 200]</box>|<box>(100,100),(200,200)</box>|坐标是[100, 100, 200, 200]",
     "<box>[100, 100, 200, 200]</box><box>[300, 300, 400, 400]</box>|不是[100, 100, 200, 200]"),
    ("accuracy", "3", "3秒|一共3个|总共有3次|三次|共3个|答案：3。", "一共3或4个|不是3个|3分钟|33秒|至少3个|一共"),
    ("choice", "B", "答案是B|选B|选项B|答案：B|B。|B!|因此选择B|正确答案是 B。|I think it's B.|应该选B",
     "不选B|不是B|应该不是B|选B或C|选A|答案不是B|答案是A或者B|B还是C|不应该选(B)|选B?|选AB|既不是A也不是B"),
    ("json", '{"n": 3, "ok": true}', '{"n": 3.0, "ok": true}|```json\r\n{"n": 3, "ok": true}\r\n```',
     '{"n": 3, "ok": 1}|{"n": true, "ok": true}|{"n": "3", "ok": true}'),
    ("json", '"red"', '"red"', '"blue"|red'),
    ("json", "[1e3]", "[1000]|[1000.0]", "[1e999]|[true]"),
]  # fmt: skip
MATH = [
    (r"\frac{1}{2}", "½|**1/2**|x = 1/2|1/2 = x|0.5 = 1/2|5e-1", "1/3 = 1/2|1/2 = 1/3|1/2 = x = 1/3"),
    ("5", "5 = x|x = 5|3+2 = 5|x = 3+2 = 5|f(x) = 5|x_1 = 5", "3 = 5|5 = 3|3 = x = 5|5 = 5 = 6|x = 5 = 4"),
    ("1,000", "1e3|10^3", "1e2|1 = 1000"),
    (r"2\sqrt{3}", "2√3|2*sqrt(3)", "2√2|√3"),
    ("x=3", "x=3|3", "x=4|3=4"),
    (r"\pi", "π|pi|x = \\pi", "3 = \\pi"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "answer", "right", "wrong"), CASES)
def test_right_answers_earn_1_and_wrong_ones_0(name, answer, right, wrong):
    options = OPTIONS if name == "choice" else ()
    prompt = question(answer, options)
    rewards = rewards_from({name: {"values": True} if name == "json" else 1.0})
    for texts, value in ((right, 1.0), (wrong, 0.0)):
        for text in texts.split("|"):
            earned = rewards(judged(prompt, text))
            assert earned.total == pytest.approx(value) and not earned.failures, (text, earned)


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
def test_expressions_with_several_sides_and_signs():
    rewards = rewards_from({"math": {"time_limit": 30.0}})
    for answer, right, wrong in MATH:
        for texts, value in ((right, 1.0), (wrong, 0.0)):
            earned = rewards.all([judged(question(answer), text) for text in texts.split("|")])
            assert [one.total for one in earned] == [value] * len(earned), (answer, texts, earned)


@pytest.mark.parametrize(
    ("schema", "right", "wrong"),
    [
        ({"enum": [1, "a"]}, "1|1.0|\"a\"", "true|\"1\""),
        ({"type": "array", "items": {"enum": [0]}}, "[0]", "[false]|[0.5]"),
        ({"type": "integer"}, "3|3.0", "3.5|true"),
        ({"type": "number"}, "3|3.5", "1e999|true"),
    ],
)  # fmt: skip
def test_schemas_tell_numbers_from_booleans_and_infinity(schema, right, wrong):
    rewards = rewards_from({"json": 1.0})
    for texts, value in ((right, 1.0), (wrong, 0.0)):
        for text in texts.split("|"):
            assert rewards(judged(question("-", schema=schema), text)).total == value, text
