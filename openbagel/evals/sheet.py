"""A table as an Excel workbook, the form in which some servers take answers."""

import re
from collections.abc import Iterable
from pathlib import Path
from xml.sax.saxutils import escape
from zipfile import ZipFile, ZipInfo

X = "http://schemas.openxmlformats.org"
LINKS, SHEETS = f"{X}/officeDocument/2006/relationships", f"{X}/spreadsheetml/2006/main"
LINK = f"""<Relationships xmlns="{X}/package/2006/relationships">
<Relationship Id="r1" Type="{LINKS}/%s" Target="%s"/></Relationships>"""
KIND = "application/vnd.openxmlformats-officedocument.spreadsheetml"
FILES = {
    "[Content_Types].xml": f"""<Types xmlns="{X}/package/2006/content-types">
<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>
<Override PartName="/xl/workbook.xml" ContentType="{KIND}.sheet.main+xml"/>
<Override PartName="/xl/worksheets/sheet1.xml" ContentType="{KIND}.worksheet+xml"/></Types>""",
    "_rels/.rels": LINK % ("officeDocument", "xl/workbook.xml"),
    "xl/_rels/workbook.xml.rels": LINK % ("worksheet", "worksheets/sheet1.xml"),
    "xl/workbook.xml": f"""<workbook xmlns="{SHEETS}" xmlns:r="{LINKS}">
<sheets><sheet name="Sheet1" sheetId="1" r:id="r1"/></sheets></workbook>""",
}
BARRED = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff\ufffe\uffff]")
"""Characters that XML cannot hold."""


def write_sheet(path: Path, rows: Iterable[Iterable[str]]) -> Path:
    """Writes rows of texts; the same rows give the same bytes."""
    cell = '<c t="inlineStr"><is><t xml:space="preserve">{}</t></is></c>'
    lines = (map(cell.format, (escape(BARRED.sub("", text)) for text in row)) for row in rows)
    body = "".join(f"<row>{''.join(line)}</row>" for line in lines)
    sheet = f'<worksheet xmlns="{SHEETS}"><sheetData>{body}</sheetData></worksheet>'
    with ZipFile(path, "w") as archive:
        for name, text in {**FILES, "xl/worksheets/sheet1.xml": sheet}.items():
            archive.writestr(ZipInfo(name), f'<?xml version="1.0" encoding="UTF-8"?>\n{text}')
    return path
