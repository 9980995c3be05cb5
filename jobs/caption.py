"""Caption the images of parquet shards with a trimmed Llama-3.2-Vision."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from jobs import options


def main(arguments: Sequence[str] | None = None) -> int:
    made = options.parser("caption", __doc__ or "", leave_out=("question_column",), prompt="Describe this image.")
    return options.main("caption", made, arguments, question_column=None)


if __name__ == "__main__":
    sys.exit(main())
