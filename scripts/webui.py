"""Opens a page in the browser: drag points of a picture with the mouse.

python scripts/webui.py --tab drag
python scripts/webui.py --tab drag -r logs/<run>
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import common  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="webui.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("--tab", default="drag", help="what the page is for: drag")
    add("-r", "--run", "--ckpt", action="append", default=[], metavar="RUN", help="offer this model; may be repeated")
    add("--logs", default="logs", help="folder of runs to offer (default: logs)")
    add("--host", default="127.0.0.1", help="0.0.0.0: other computers may connect too")
    add("--port", type=int, default=7860)
    add("--device", default="auto", help="auto, cpu, cuda, mps")
    return parser


def serve(args: argparse.Namespace) -> None:
    import os

    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    from ldm import webui

    runs = [*args.run, *webui.models_in([args.logs, ROOT / "models" / "gan"])]
    page = webui.build(runs, args.tab, args.device)
    print(f"models: {', '.join(runs) or 'none found; name one with -r'}")
    page.launch(server_name=args.host, server_port=args.port, share=False, quiet=False)


if __name__ == "__main__":
    sys.exit(common.main(build_parser(), serve))
