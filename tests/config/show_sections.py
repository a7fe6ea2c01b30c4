"""A stage that is handed all sections and prints them; started by test_params.

python -m tests.config.show_sections [OVERRIDE …]
"""

import json
from dataclasses import asdict

from stages.config import entry, sections


def main(**given: object) -> None:
    print("GIVEN", json.dumps({name: asdict(section) for name, section in given.items()}))


names = [name for name in sections.SECTIONS if name != "environment"]
if __name__ == "__main__":
    entry.stage(*names)(main)()
