#!/usr/bin/env python3
"""Write the README's table of options from the option table.

    python3 tests/readme_options.py
"""
import json
import os
import re
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, ROOT)

import ccproxy  # noqa: E402


def option_row(option):
    default = option.default if isinstance(option.default, str) else json.dumps(option.default)
    cells = ("`%s`" % option.name, "`%s`" % ccproxy.flag_name(option),
             ", ".join("`%s`" % name for name in ccproxy.environment_names(option)),
             "`%s`" % default if option.default not in ("", [], {}) else "none",
             option.help.replace("*", "\\*").replace("|", "\\|"))
    return "| " + " | ".join(cells) + " |\n"


def main():
    path = os.path.join(ROOT, "README.md")
    with open(path, encoding="utf-8") as file:
        text = file.read()
    table = "".join(map(option_row, ccproxy.OPTIONS))
    text = re.sub(r"(?m)(^\| `\w+` \| `--.*\n)+", lambda _: table, text, count=1)
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)


if __name__ == "__main__":
    main()
