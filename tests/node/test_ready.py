"""What a node prints when it serves has one fact per line, and fits on a screen of 80 columns."""

from dataclasses import replace

from treeswarm_node.serve import SCREEN, HostedModel, Ready

HOSTED = HostedModel(
    model="HuggingFaceTB/SmolLM2-135M-Instruct",
    blocks="0:15",
    of=30,
    dtype="float32",
    device="cpu",
    attention="torch",
    weights="ab" * 32,
    kv_tokens=65536,
    kv_row_bytes=15 * 1536,
    rate=1000.0,
    automatic="no GPU is usable, as torch was built without CUDA, so that float32 is the faster one on this CPU",
)
CODE = "swarm:192.168.1.7:35313/bbzn-cg6z-5r01-28hk-khn9"
SPECULATING = replace(HOSTED, speculator="autoregressive", agreement=0.53)
READY = Ready("12" * 16, "192.168.1.7:35313", "0f" * 16, HOSTED, CODE, CODE, None, private=True, ports="35313, 35314")


def test_lines_fit_on_a_screen_except_commands_to_copy() -> None:
    lines = str(READY).splitlines()
    assert lines[0] == "swarm-node ready on 192.168.1.7:35313"
    copied = ("  nodes join with:", "  clients ask with:")
    assert [line for line in lines if len(line) > SCREEN and not line.startswith(copied)] == []


def test_every_fact_has_a_line_of_its_own() -> None:
    text = str(READY)
    for fact in (
        "blocks:           0:15 of 30",
        "computes:         on cpu in float32",
        "KV cache:         65536 tokens of 22.5 KiB",
        "identity:         12",
        "pin:  ",
    ):
        assert f"\n  {fact}" in text
    assert "\n                    auto: no GPU is usable" in text
    assert f"\n  join code:        {CODE}\n" in text


def test_a_speculator_has_a_line_and_two_keys() -> None:
    ready = replace(READY, hosted=SPECULATING)
    assert "\n  proposes trees:   autoregressive, first guess right in 53% of cases\n" in str(ready)
    assert "proposes" not in str(READY)
    said = [(line.as_dict()["speculator"], line.as_dict()["agreement"]) for line in (ready, READY)]
    assert said == [("autoregressive", 0.53), (None, None)]
