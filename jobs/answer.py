"""Answer the questions of parquet shards about their images with a trimmed Llama-3.2-Vision."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import options


def main(arguments: Sequence[str] | None = None) -> int:
    made = options.parser("answer", __doc__ or "", leave_out=("prompt",))
    return options.main("answer", made, arguments)


if __name__ == "__main__":
    sys.exit(main())
