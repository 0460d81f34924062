"""Annotates whole files and folders: rows in, one record per row out, in order.

A file is processed in chunks of rows. Where a chunk ends depends on the rows alone, and batches never cross a chunk, so a
chunk's records do not depend on the process that computes them. Each chunk becomes a part: a file in `OUTPUT.partial` that
is there in full or not at all. Once all parts exist they are joined into the output, so a run can be stopped at any moment
and resumed.

- `sources`: reads rows from csv, jsonl, parquet and text files and groups them into chunks.
- `annotator`: loads the model and turns a chunk into records.
- `parts`: writes parts and joins them; owns every file beside the output.
- `run`: annotates one file, in this process or with several worker processes (`workers`).
- `ray_engine`: annotates a folder of files on Ray.
"""
