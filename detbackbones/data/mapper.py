"""CheckedDatasetMapper: detectron2's DatasetMapper with errors that name the file."""

from detectron2.data import DatasetMapper
from detectron2.data.detection_utils import SizeMismatchError, read_image
from PIL import Image

from ..messages import first_line

DATA_ERRORS = (OSError, SizeMismatchError)  # wrong images, which are read while training


class CheckedDatasetMapper(DatasetMapper):
    """detectron2's ``DatasetMapper``, with errors that name the file that could not be read.

    It takes the same arguments: in a LazyConfig, set ``mapper._target_ = CheckedDatasetMapper``.
    """

    def __call__(self, dataset_dict: dict) -> dict:
        """Map one dataset dict as detectron2's ``DatasetMapper`` does.

        Args:
            dataset_dict: one image in detectron2's dataset format.

        Returns:
            the model's input, with ``image`` of shape (C, H, W).

        Raises:
            OSError: if the image or its label map cannot be read or decoded.
            SizeMismatchError: if the image has not the size that the dataset states; a ValueError.
        """
        file = dataset_dict["file_name"]
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:
            height, width = read_image(file).shape[:2]
            raise SizeMismatchError(
                f"image '{file}': size={dataset_dict.get('width')}x{dataset_dict.get('height')} "
                f"(width x height) in the dataset must be {width}x{height}, that of the file"
            ) from error
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            label = dataset_dict.get("sem_seg_file_name")
            files = f"image '{file}'" + (f" or its label map '{label}'" if label else "")
            raise OSError(f"{files} cannot be read: {first_line(error)}") from error
