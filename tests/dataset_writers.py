"""COCO's content written in the formats of others, to be read back."""

import csv
import json
import shutil
from pathlib import Path

import yaml


def by_image(content):
    """The annotations of each image."""
    found = {image["id"]: [] for image in content["images"]}
    for annotation in content["annotations"]:
        found[annotation["image_id"]].append(annotation)
    return found


def corners(annotation):
    x, y, width, height = annotation["bbox"]
    return x, y, x + width, y + height


def copy_images(content, images, folder):
    folder.mkdir(parents=True)
    for image in content["images"]:
        shutil.copy(images / image["file_name"], folder / Path(image["file_name"]).name)


def coco(splits, images, folder):
    """As Roboflow exports it: the file beside the images."""
    for split, content in splits.items():
        copy_images(content, images, folder / split)
        (folder / split / "_annotations.coco.json").write_text(json.dumps(content))


def yolo(splits, images, folder):
    names = [x["name"] for x in next(iter(splits.values()))["categories"]]
    ids = {x["id"]: i for i, x in enumerate(next(iter(splits.values()))["categories"])}
    yaml_content = {"names": names, "nc": len(names)}
    for split, content in splits.items():
        copy_images(content, images, folder / split / "images")
        (folder / split / "labels").mkdir()
        yaml_content[split] = f"../{split}/images"
        annotations = by_image(content)
        for image in content["images"]:
            lines, (w, h) = [], (image["width"], image["height"])
            for x in annotations[image["id"]]:
                if x.get("segmentation"):
                    (points,) = x["segmentation"]
                    place = [value / (w, h)[i % 2] for i, value in enumerate(points)]
                else:
                    left, top, right, bottom = corners(x)
                    place = [(left + right) / 2 / w, (top + bottom) / 2 / h]
                    place += [(right - left) / w, (bottom - top) / h]
                lines.append(" ".join(map(str, [ids[x["category_id"]], *place])))
            file = folder / split / "labels" / Path(image["file_name"]).with_suffix(".txt").name
            file.write_text("\n".join(lines))
    (folder / "data.yaml").write_text(yaml.safe_dump(yaml_content))


def voc(splits, images, folder):
    """The devkit's folders; pixels count from 1."""
    (folder / "Annotations").mkdir(parents=True)
    (folder / "ImageSets" / "Main").mkdir(parents=True)
    (folder / "JPEGImages").mkdir()
    for split, content in splits.items():
        names = {x["id"]: x["name"] for x in content["categories"]}
        annotations, stems = by_image(content), []
        for image in content["images"]:
            name = Path(image["file_name"]).name
            stems.append(Path(name).stem)
            shutil.copy(images / image["file_name"], folder / "JPEGImages" / name)
            objects = ""
            for x in annotations[image["id"]]:
                left, top, right, bottom = corners(x)
                objects += (
                    f"<object><name>{names[x['category_id']]}</name><bndbox><xmin>{left + 1}</xmin>"
                    f"<ymin>{top + 1}</ymin><xmax>{right}</xmax><ymax>{bottom}</ymax></bndbox>"
                    "</object>\n"
                )
            (folder / "Annotations" / f"{stems[-1]}.xml").write_text(
                f"<annotation><filename>{name}</filename><size><width>{image['width']}</width>"
                f"<height>{image['height']}</height><depth>3</depth></size>\n{objects}</annotation>"
            )
        (folder / "ImageSets" / "Main" / f"{split}.txt").write_text("\n".join(stems))


def table(splits, images, folder):
    for split, content in splits.items():
        copy_images(content, images, folder / "images" / split)
        names = {x["id"]: x["name"] for x in content["categories"]}
        annotations = by_image(content)
        with (folder / f"{split}_labels.csv").open("w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["filename", "width", "height", "class", "xmin", "ymin", "xmax", "ymax"])
            for image in content["images"]:
                first = [Path(image["file_name"]).name, image["width"], image["height"]]
                for x in annotations[image["id"]]:
                    rows.writerow([*first, names[x["category_id"]], *corners(x)])
                if not annotations[image["id"]]:
                    rows.writerow([*first, *[""] * 5])


def labelme(splits, images, folder):
    for split, content in splits.items():
        copy_images(content, images, folder / split)
        names = {x["id"]: x["name"] for x in content["categories"]}
        annotations = by_image(content)
        for image in content["images"]:
            shapes, name = [], Path(image["file_name"]).name
            for x in annotations[image["id"]]:
                left, top, right, bottom = corners(x)
                shape = {"shape_type": "rectangle", "points": [[left, top], [right, bottom]]}
                if x.get("segmentation"):
                    (points,) = x["segmentation"]
                    pairs = [list(pair) for pair in zip(points[::2], points[1::2])]
                    shape = {"shape_type": "polygon", "points": pairs}
                shapes.append({"label": names[x["category_id"]], **shape})
            text = {"version": "5.0", "shapes": shapes, "imagePath": name}
            text |= {"imageHeight": image["height"], "imageWidth": image["width"]}
            (folder / split / Path(name).with_suffix(".json")).write_text(json.dumps(text))


def cvat(splits, images, folder):
    names = [x["name"] for x in next(iter(splits.values()))["categories"]]
    labels = "".join(f"<label><name>{name}</name></label>" for name in names)
    text = f"<annotations><meta><task><labels>{labels}</labels></task></meta>\n"
    for split, content in splits.items():
        copy_images(content, images, folder / "images" / split)
        names, annotations = {x["id"]: x["name"] for x in content["categories"]}, by_image(content)
        for image in content["images"]:
            text += (
                f'<image id="{image["id"]}" name="{Path(image["file_name"]).name}" '
                f'subset="{split}" width="{image["width"]}" height="{image["height"]}">\n'
            )
            for x in annotations[image["id"]]:
                label, (left, top, right, bottom) = names[x["category_id"]], corners(x)
                if x.get("segmentation"):
                    (points,) = x["segmentation"]
                    pairs = ";".join(f"{a},{b}" for a, b in zip(points[::2], points[1::2]))
                    text += f'<polygon label="{label}" points="{pairs}"></polygon>\n'
                else:
                    text += f'<box label="{label}" xtl="{left}" ytl="{top}" xbr="{right}" '
                    text += f'ybr="{bottom}"></box>\n'
            text += "</image>\n"
    (folder / "annotations.xml").write_text(f"{text}</annotations>")


def label_studio(splits, images, folder):
    tasks = []
    for split, content in splits.items():
        copy_images(content, images, folder / split)
        names, annotations = {x["id"]: x["name"] for x in content["categories"]}, by_image(content)
        for image in content["images"]:
            results, (w, h) = [], (image["width"], image["height"])
            for x in annotations[image["id"]]:
                label = [names[x["category_id"]]]
                left, top, right, bottom = corners(x)
                value = {"x": 100 * left / w, "y": 100 * top / h, "rotation": 0}
                value |= {"width": 100 * (right - left) / w, "height": 100 * (bottom - top) / h}
                kind = "rectanglelabels"
                if x.get("segmentation"):
                    (points,) = x["segmentation"]
                    pairs = zip(points[::2], points[1::2])
                    kind = "polygonlabels"
                    value = {"points": [[100 * a / w, 100 * b / h] for a, b in pairs]}
                results.append({"type": kind, "value": {**value, kind: label}})
            address = f"/data/upload/1/0a1b2c3d-{Path(image['file_name']).name}"
            tasks.append(
                {
                    "id": len(tasks) + 1,
                    "data": {"image": address},
                    "annotations": [{"was_cancelled": True}, {"result": results}],
                }
            )
    (folder / "project.json").write_text(json.dumps(tasks))


WRITERS = {
    "coco": coco,
    "yolo": yolo,
    "voc": voc,
    "csv": table,
    "labelme": labelme,
    "cvat": cvat,
    "label_studio": label_studio,
}
