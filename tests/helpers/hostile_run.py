"""A run folder in which every text attempts an injection of markup, script or style, or breaks the layout."""

from __future__ import annotations

from pathlib import Path

from prunekit.runs.run_dir import RunDir

LONG = "unbroken" * 60
ATTACKS = (
    "<script>window.hit=1</script>",
    '"><img src=x onerror="window.hit=1">',
    "</style><style>body{display:none}</style>",
    "</script><script>window.hit=1</script>",
    "</title></pre></td></table><h1>out</h1>",
    "]]><svg onload=window.hit=1>-->",
    "' onmouseover='window.hit=1",
    "{{ 7 * 191 }}{% raw %}&lt;&amp;",
    "$x_{$ \\frac",
    "javascript:window.hit=1",
    "\u202egnp.evil\u2066",
    "nul\u0000bell\u0007",
    LONG,
)


def hostile_run(folder: Path) -> Path:
    """Write the run folder into ``folder``; its name is an attack too."""
    path = folder / f'"><img src=x onerror=window.hit=1>\u202e<b>{"n" * 90}'
    text = " ".join(ATTACKS)
    quoted = text.replace("'", "''").replace("\0", "").replace("\a", "")
    recipe = (
        f"name: '{quoted}'\ntask: '{quoted}'\nbackbone:\n  name: '{quoted}'\ndata:\n  name: '{quoted}'\n# {quoted}\n"
    )
    environment = {
        "platform": text,
        "device": text,
        "packages": {text: text, "torch": None},
        "command": ["prunekit", *ATTACKS],
        text: text,
    }
    both = {"before": 8, "after": 4}
    model = {"params": 8, "macs": 64, "paper_flops": None, "metrics": {text: 0.5, "mae": 0.25}}
    with RunDir.start(path, recipe, environment) as run:
        run.begin("train")
        run.append_metrics({"stage": "train", "epoch": 1, "loss": 0.5, "metrics": {text: 0.1, "mae": 0.2}})
        run.update_summary("dense", model)
        run.end("train")
        run.begin("extract")
        run.write_json("extract/plan.json", {"format": 1, "groups": {text: [0]}, "notes": list(ATTACKS)})
        run.end("extract")
        run.begin("slim")
        rows = [
            {"layer": f"{index}{attack}", "branch": 0, **dict.fromkeys(("channels", "params", "macs"), both)}
            for index, attack in enumerate(ATTACKS)
        ]
        counts = {"prunekit": {"params": 8, "macs": 64}, "thop": {"params": 8, "macs": 65}}
        run.write_json("layers.json", {"format": 1, "size": [8, 8], "layers": rows, "counters": {text: counts}})
        run.update_summary("slim", model)
        run.update_summary("equivalence", {"passed": False, "reason": text, "max_abs_diff": 1.0, "tolerance": 1e-6})
        run.end("slim")
        run.begin("evaluate")
        run.update_summary("reference", {text: {text: 0.1}})
        run.write_json("classes.json", list(ATTACKS))
        run.end("evaluate")
        run.add_seconds("train", 1.0)
    return path
