"""
Qwen-Image-Edit and Qwen-Image-Edit-Plus (2509, 2511), with one source picture.
"""
import sys

from configurator import need
from families.qwen import Qwen
from support.files import open_image


def tell_pictures(encoder, args, inputs):
    """Which tokens are of the picture. transformers 5 asks for it, and the pipelines do not say:
    its tokens would have places in a line, unlike those that the model was trained with."""
    if inputs.get('image_grid_thw') is not None and inputs.get('mm_token_type_ids') is None:
        pictures = inputs['input_ids'] == encoder.config.image_token_id
        inputs['mm_token_type_ids'] = pictures.int()
    return args, inputs


class QwenEdit(Qwen):
    """The text encoder looks at the source as the pipeline shows it: whole, Edit at a megapixel,
    Plus at 384 x 384 pixels' area. Its latents follow the target's, here at the target's size; the
    pipelines bring every source to about a megapixel, so train at resolution 1024 or near it."""
    editors = 'QwenImageEditPipeline', 'QwenImageEditPlusPipeline'
    sees_source = True

    def __init__(self, pipe, *a, **k):
        super().__init__(pipe, *a, **k)
        pipe.text_encoder.register_forward_pre_hook(tell_pictures, with_kwargs=True)

    def encode(self, prompt, source=''):
        need(source, f'{type(self.pipe).__name__} reads no words without a source picture: give '
             'every row a source_image, or take QwenImagePipeline for rows without one')
        module = sys.modules[type(self.pipe).__module__]
        area = getattr(module, 'CONDITION_IMAGE_SIZE', 1024 ** 2)
        im = open_image(source)
        width, height, *_ = module.calculate_dimensions(area, im.width / im.height)
        seen = self.pipe.image_processor.resize(im, height, width)
        e, _ = self.pipe.encode_prompt([prompt or ' '], seen, self.device)
        return dict(text=e[0])
