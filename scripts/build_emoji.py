"""Build the embedded emoji data set from Debian's packages fonts-noto-color-emoji, unicode-cldr-core and unicode-data.

    python scripts/build_emoji.py                                     # fetches the packages; root is not needed
    python scripts/build_emoji.py --deb FONT.deb --deb CLDR.deb --deb DATA.deb

Writes images.zip, names.jsonl.xz, the two licences and SHA256SUMS. The same packages, with the same version of Pillow,
give the same bytes.

Rules: every sequence that CLDR names in English, without skin tones, for which the font has one coloured glyph; of
sequences with the same picture (the flags of some islands) the one with the shortest name. Pictures are 64 x 64 on white.
Names and keywords are CLDR's, in ten languages; a keyword that is the name is left out. Categories are the groups and
subgroups of Unicode's emoji-test.txt; a sign that it lists only as a keycap ("hash sign") has the keycap's.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import subprocess
import tempfile
import zipfile
from collections import defaultdict
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image, ImageDraw, ImageFont

from nearfield.methods.emoji import FOLDER, LANGUAGES, SIDE
from nearfield.methods.on_demand import unpacked
from nearfield.methods.wordnet import pack

PACKAGES = ("fonts-noto-color-emoji", "unicode-cldr-core", "unicode-data")
FONT = "usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
CLDR = "usr/share/unicode/cldr/common"
CATEGORIES = "usr/share/unicode/emoji/emoji-test.txt"
LICENCES = {"LICENSE-OFL-1.1": "fonts-noto-color-emoji", "LICENSE-Unicode-DFS-2016": "unicode-cldr-core"}
STRIKE = 109
"""The one size that the font has."""
GLYPH = 136
"""Its width; the height is 128."""
KEYCAP = "\u20e3"
SKIN_TONES = range(0x1F3FB, 0x1F400)
QUALITY = 75
Annotations = dict[str, tuple[str, list[str]]]


def annotations(cldr: Path, language: str) -> Annotations:
    """Sequence -> name and keywords in a language."""
    names: dict[str, str] = {}
    keywords: dict[str, list[str]] = defaultdict(list)
    for folder in ("annotations", "annotationsDerived"):
        for entry in ElementTree.parse(cldr / folder / f"{language}.xml").getroot().iter("annotation"):
            sequence, text = entry.get("cp", ""), (entry.text or "").strip()
            if entry.get("type") == "tts":
                names[sequence] = text
            else:
                keywords[sequence] = [word.strip() for word in text.split("|")]
    return {
        sequence: (name, [word for word in dict.fromkeys(keywords[sequence]) if word and word != name])
        for sequence, name in names.items()
        if name
    }


def render(font: ImageFont.FreeTypeFont, sequence: str) -> Image.Image | None:
    """The picture of a sequence on white, 136 x 136; None where the font has not one coloured glyph for it."""
    if not 0 < font.getlength(sequence) <= GLYPH:
        return None
    clear = Image.new("RGBA", (GLYPH, GLYPH))
    ImageDraw.Draw(clear).text((0, 0), sequence, font=font, embedded_color=True)
    if clear.getbbox() is None:
        return None
    white = Image.new("RGBA", clear.size, (255, 255, 255, 255))
    white.alpha_composite(clear)
    return white.convert("RGB")


def chosen(font: ImageFont.FreeTypeFont, english: Annotations) -> dict[str, Image.Image]:
    """Sequence -> picture, in the order of code points."""
    best: dict[bytes, str] = {}
    pictures: dict[str, Image.Image] = {}
    for sequence in sorted(english):
        if any(ord(character) in SKIN_TONES for character in sequence):
            continue
        picture = render(font, sequence)
        if picture is None:
            continue
        pictures[sequence] = picture
        key = picture.tobytes()
        other = best.setdefault(key, sequence)
        if len(english[sequence][0]) < len(english[other][0]):
            best[key] = sequence
    return {sequence: pictures[sequence] for sequence in sorted(best.values())}


def categories(path: Path) -> dict[str, tuple[str, str]]:
    """Sequence, without variation selectors -> Unicode's group and subgroup."""
    found: dict[str, tuple[str, str]] = {}
    group = subgroup = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("# group: "):
            group = line.removeprefix("# group: ").strip()
        elif line.startswith("# subgroup: "):
            subgroup = line.removeprefix("# subgroup: ").strip()
        elif line and not line.startswith("#"):
            sequence = "".join(chr(int(code, 16)) for code in line.partition(";")[0].split())
            found.setdefault(bare(sequence), (group, subgroup))
    return found


def bare(sequence: str) -> str:
    """Without variation selectors, which CLDR leaves out."""
    return sequence.replace("\ufe0f", "")


def code_of(sequence: str) -> str:
    """Code points in hex, e.g. ``1f468-200d-1f466``."""
    return "-".join(f"{ord(character):x}" for character in sequence)


def packed_pictures(pictures: dict[str, Image.Image]) -> bytes:
    """A zip of WebP files, stored as they are, with fixed dates."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for sequence, picture in pictures.items():
            small = picture.resize((SIDE, SIDE), resample=Image.Resampling.LANCZOS)
            data = io.BytesIO()
            small.save(data, "WEBP", quality=QUALITY, method=6)
            archive.writestr(zipfile.ZipInfo(f"{code_of(sequence)}.webp"), data.getvalue())
    return target.getvalue()


def licence(path: Path, name: str) -> str:
    """The paragraphs of a package's copyright file that are about the data: Debian's file as it is, under a head."""
    head = {
        "LICENSE-OFL-1.1": "The pictures in images.zip are made from the font Noto Color Emoji (SIL Open Font License 1.1,\n"
        "called SIL-1.1 below), made smaller and without the font's other content.",
        "LICENSE-Unicode-DFS-2016": "The names and keywords in names.jsonl.xz are from the Unicode CLDR, the categories from its emoji-test.txt.",
    }[name]
    return f"{head}\n\nWhat Debian's package says of copyright and licence:\n\n{path.read_text(encoding='utf-8').strip()}\n"


def build(root: Path, out: Path) -> None:
    """Write the files from unpacked packages."""
    font = ImageFont.truetype(str(root / FONT), STRIKE, layout_engine=ImageFont.Layout.RAQM)
    known = {language: annotations(root / CLDR, language) for language in LANGUAGES}
    pictures = chosen(font, known["en"])
    placed = categories(root / CATEGORIES)
    rows = []
    for sequence in pictures:
        names = {language: found[sequence][0] for language, found in known.items()}
        keywords = {language: found[sequence][1] for language, found in known.items()}
        flag = known["en"][sequence][0].startswith("flag: ")
        category, subcategory = placed.get(bare(sequence)) or placed[bare(sequence) + KEYCAP]
        row = {"code": code_of(sequence), "flag": flag, "category": category, "subcategory": subcategory}
        rows.append({**row, "names": names, "keywords": keywords})
    out.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps(row, ensure_ascii=False, separators=(",", ":")) + "\n" for row in rows)
    sums = []
    for name, data in (("images.zip", packed_pictures(pictures)), ("names.jsonl.xz", pack(lines))):
        (out / name).write_bytes(data)
        sums.append(f"{hashlib.sha256(data).hexdigest()}  {name}\n")
        print(f"{name}: {len(data):,} bytes")
    print(f"{len(rows):,} pictures, {sum(bool(row['flag']) for row in rows):,} flags")
    for name, package in LICENCES.items():
        text = licence(root / "usr/share/doc" / package / "copyright", name)
        (out / name).write_text(text, encoding="utf-8")
    (out / "SHA256SUMS").write_text("".join(sums), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--deb", type=Path, action="append", help="a package, fetched before; give all three")
    parser.add_argument("--out", type=Path, default=FOLDER)
    arguments = parser.parse_args()
    if not arguments.deb:
        with unpacked(PACKAGES) as root:
            build(root, arguments.out)
        return
    with tempfile.TemporaryDirectory() as folder:
        for file in arguments.deb:
            subprocess.run(["dpkg-deb", "-x", str(file), folder], check=True)
        build(Path(folder), arguments.out)


if __name__ == "__main__":
    main()
