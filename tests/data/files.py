"""Tiny real data sets in every format, written into a folder: small pictures, short sentences.

Every `write_…` makes its folder and returns the path that a mixture names: the folder of parquet files or
pictures, or the JSONL or tar file. Everything is a function of the arguments.
"""

import io
import json
import random
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import yaml
from PIL import Image

COLOURS = ("red", "green", "blue", "black")


def picture(seed: int, size: tuple[int, int] = (12, 8)) -> Image.Image:
    """A smooth random picture of (width, height) pixels."""
    small = np.random.default_rng(seed).integers(0, 256, (2, 2, 3), dtype=np.uint8)
    return Image.fromarray(small).resize(size, Image.Resampling.BICUBIC)


def encoded(seed: int, size: tuple[int, int] = (12, 8), kind: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    picture(seed, size).save(buffer, kind)
    return buffer.getvalue()


def caption(seed: int) -> str:
    return f"a {COLOURS[seed % 4]} circle number {seed}"


# rows ------------------------------------------------------------------------------------------------------


def t2i_row(seed: int) -> dict[str, Any]:
    captions = {"short": caption(seed), "long": f"{caption(seed)} above a square"}
    return {"image": encoded(seed, (12 + 4 * (seed % 3), 8)), "captions": json.dumps(captions)}


def edit_row(seed: int, images: int = 3) -> dict[str, Any]:
    return {
        "image_list": [encoded(100 * seed + i) for i in range(images)],
        "instruction_list": [[f"step {i} of {seed}", f"do {i} of {seed}"] for i in range(images - 1)],
    }


def vlm_row(seed: int, image: str | list[str]) -> dict[str, Any]:
    marks = "<image>" * (len(image) if isinstance(image, list) else 1)
    turns = [
        {"from": "human", "value": f"{marks}\nhow many circles are in picture {seed}?"},
        {"from": "gpt", "value": f"there are {seed} circles"},
        {"from": "human", "value": "what colour?"},
        {"from": "gpt", "value": COLOURS[seed % 4]},
    ]
    return {"image": image, "conversations": turns}


def reasoning_row(seed: int) -> dict[str, Any]:
    """Rows take turns: draw from a caption, edit a picture."""
    thought = {"thought": f"the user wants {caption(seed)}"}
    if seed % 2:
        return {"image_list": edit_row(seed, 2)["image_list"], "instruction": "make it blue", **thought}
    return {"image": encoded(seed), "caption": caption(seed), **thought}


def document_row(seed: int) -> dict[str, Any]:
    """text, picture with a caption, text, picture with a caption, text."""
    return {
        "texts": [f"page {seed} begins", None, "then it goes on", None, "and ends"],
        "images": [None, encoded(seed), None, encoded(seed + 50), None],
        "captions": [None, caption(seed), None, caption(seed + 50), None],
    }


def frames_row(seed: int, frames: int = 4) -> dict[str, Any]:
    return {
        "frames": [encoded(10 * seed + i) for i in range(frames)],
        "captions": [f"the circle moves {i}" for i in range(frames - 1)],
    }


# files -----------------------------------------------------------------------------------------------------


def write_parquet(
    path: Path, rows: Sequence[dict[str, Any]], *, row_group: int = 2, checksums: bool = True
) -> Path:
    """A parquet file with `row_group` rows a group, uncompressed so that a flipped byte hits a value."""
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    names = dict.fromkeys(name for row in rows for name in row)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pydict({name: [row.get(name) for row in rows] for name in names}),
        path,
        row_group_size=row_group,
        compression="none",
        use_dictionary=False,
        write_page_checksum=checksums,
        write_statistics=False,  # they repeat values in the page headers, which no checksum covers
    )
    return path


def write_jsonl(path: Path, rows: Sequence[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_t2i(folder: Path, *, rows: int = 6, files: int = 1) -> Path:
    """`rows` rows in all, in `files` parquet files of two-row groups."""
    for index in range(files):
        write_parquet(folder / f"part-{index}.parquet", [t2i_row(i) for i in range(index, rows, files)])
    return folder


def write_edit(folder: Path, *, rows: int = 4, images: int = 3) -> Path:
    """The official hierarchy: `folder`/seedxedit_multi (returned) and
    `folder`/parquet_info/seedxedit_multi.json.
    """
    data = folder / "seedxedit_multi"
    path = write_parquet(data / "chunk_0.parquet", [edit_row(i, images) for i in range(rows)])
    info = folder / "parquet_info" / "seedxedit_multi.json"
    info.parent.mkdir()
    info.write_text(json.dumps({str(path): {"num_row_groups": (rows + 1) // 2, "num_rows": rows}}))
    return data


def write_vlm(folder: Path, *, rows: int = 5) -> Path:
    """`folder`/images and `folder`/llava_ov_si.jsonl (returned); every third row shows two pictures."""
    (folder / "images").mkdir(parents=True)
    names = [f"{i}.png" for i in range(rows + 1)]
    for seed, name in enumerate(names):
        picture(seed, (16, 8)).save(folder / "images" / name)
    shown = [names[i : i + 2] if i % 3 == 2 else names[i] for i in range(rows)]
    return write_jsonl(folder / "llava_ov_si.jsonl", [vlm_row(i, image) for i, image in enumerate(shown)])


def write_video(
    path: Path,
    *,
    frames: int = 20,
    size: tuple[int, int] = (32, 16),
    codec: Literal["mpeg4", "libx264"] = "mpeg4",
    fast_start: bool = False,
) -> Path:
    """An MP4 whose frame number i is grey 10·i, 5·i if there are many, every twentieth stored whole; its
    header comes first for a fast start.
    """
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w", options={"movflags": "faststart"} if fast_start else {}) as container:
        groups = {"g": "20", "bf": "0", "sc_threshold": "0" if codec == "libx264" else "1000000000"}
        stream = container.add_stream(codec, rate=10, options=groups)
        stream.width, stream.height, stream.pix_fmt = *size, "yuv420p"
        for index in range(frames):
            grey = (10 if frames <= 25 else 5) * index
            shade = np.full((size[1], size[0], 3), grey, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shade, format="rgb24")))
        container.mux(stream.encode())
    return path


def cut_video(source: Path, path: Path, first: int, *, keep_before: bool) -> Path:
    """A video from a frame on, its packets as they are; those before it stay, at times below 0, or go."""
    import av

    with av.open(str(source)) as whole, av.open(str(path), "w") as container:
        stream = container.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.pts is None or packet.dts is None or packet.time_base is None:
                continue
            offset = round(first / 10 / packet.time_base)
            packet.pts, packet.dts, packet.stream = packet.pts - offset, packet.dts - offset, stream
            if packet.pts >= 0 or keep_before:
                container.mux(packet)
    return path


def write_vlm_video(folder: Path, *, rows: int = 2, frames: int = 20) -> Path:
    """`folder`/videos and `folder`/videos.jsonl (returned)."""
    write_video(folder / "videos" / "clip.mp4", frames=frames)
    turns = [{"from": "human", "value": "<video>\nwhat happens?"}, {"from": "gpt", "value": "it fades"}]
    return write_jsonl(folder / "videos.jsonl", [{"video": "videos/clip.mp4", "conversations": turns}] * rows)


def write_text(folder: Path, *, rows: int = 5) -> Path:
    return write_jsonl(folder / "text.jsonl", [{"text": f"{caption(i)}. " * 3} for i in range(rows)])


def write_documents(folder: Path, *, rows: int = 4) -> Path:
    """Texts and pictures in order, for `interleaved_und` and `web_interleaved`."""
    write_parquet(folder / "documents.parquet", [document_row(i) for i in range(rows)])
    return folder


def write_frames(folder: Path, *, rows: int = 4, frames: int = 4) -> Path:
    """Frames with change captions, for `video_interleaved`."""
    write_parquet(folder / "clips.parquet", [frames_row(i, frames) for i in range(rows)])
    return folder


def write_reasoning(folder: Path, *, rows: int = 4) -> Path:
    write_parquet(folder / "thoughts.parquet", [reasoning_row(i) for i in range(rows)])
    return folder


def write_tar(folder: Path, *, rows: int = 4) -> Path:
    """`folder`/shard.tar (returned) of pictures with .txt captions and, every second, .json fields."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "shard.tar"
    with tarfile.open(path, "w") as tar:
        for index in range(rows):
            members = {"jpg": encoded(index, kind="JPEG")}
            if index % 2:
                members["json"] = json.dumps({"caption": caption(index)}).encode()
            else:
                members["txt"] = caption(index).encode()
            for ending, content in members.items():
                info = tarfile.TarInfo(f"shard/{index:05d}.{ending}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def write_folder(folder: Path, *, rows: int = 4) -> Path:
    """Pictures, each with a .txt of its name."""
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(rows):
        picture(index).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(caption(index) + "\n")
    return folder


# mixtures --------------------------------------------------------------------------------------------------

VAE_ARGS = {"image_stride": 4, "max_image_size": 32, "min_image_size": 8}
"""Sizes for the model of tests/tiny.py, as VIT_ARGS."""
VIT_ARGS = dict(VAE_ARGS)


def write_official(folder: Path, *, rows: int = 6) -> Path:
    """t2i/, editing/ and vlm/ as the official example lays them out, and `folder`/mixture.yaml (returned)."""
    write_t2i(folder / "t2i", rows=rows, files=2)
    write_edit(folder / "editing", rows=rows)
    write_vlm(folder / "vlm", rows=rows)
    info = {
        "t2i_pretrain": {"t2i": {"data_dir": "t2i", "num_files": 2, "num_total_samples": rows}},
        "unified_edit": {
            "seedxedit_multi": {
                "data_dir": "editing/seedxedit_multi",
                "num_files": 1,
                "num_total_samples": rows,
                "parquet_info_path": "editing/parquet_info/seedxedit_multi.json",
            }
        },
        "vlm_sft": {
            "llava_ov": {
                "data_dir": "vlm/images",
                "jsonl_path": "vlm/llava_ov_si.jsonl",
                "num_total_samples": rows,
            }
        },
    }
    mixture = {
        "t2i_pretrain": {
            "dataset_names": ["t2i"],
            "image_transform_args": dict(VAE_ARGS),
            "is_mandatory": True,
            "num_used_data": [2],
            "weight": 1,
        },
        "unified_edit": {
            "dataset_names": ["seedxedit_multi"],
            "image_transform_args": dict(VAE_ARGS),
            "vit_image_transform_args": dict(VIT_ARGS),
            "is_mandatory": False,
            "num_used_data": [1],
            "weight": 1,
        },
        "vlm_sft": {
            "dataset_names": ["llava_ov"],
            "image_transform_args": {**VIT_ARGS, "max_pixels": 4096},
            "frame_sampler_args": {"max_num_frames": 12, "min_num_frames": 8},
            "is_mandatory": True,
            "shuffle_lines": True,
            "shuffle_seed": 0,
            "num_used_data": [rows],
            "weight": 1,
        },
        "dataset_info": info,
    }
    path = folder / "mixture.yaml"
    path.write_text(yaml.safe_dump(mixture, sort_keys=False))
    return path


def random_seeds(seed: int, count: int) -> list[random.Random]:
    """Generators that differ, for trying a task many times."""
    return [random.Random(f"{seed}/{index}") for index in range(count)]


def flip_byte(path: Path, value: bytes) -> None:
    """Changes one bit in the middle of the first place of `value` in a file."""
    content = bytearray(path.read_bytes())
    content[content.index(value) + len(value) // 2] ^= 1
    path.write_bytes(content)
