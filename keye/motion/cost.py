"""Operations of a motion pathway, from its settings alone."""

from keye.motion.settings import MotionSettings


def motion_operations(settings: MotionSettings) -> int:
    """Floating-point operations of the Fast CNN for one frame; a multiplication and an addition count as two.

    The lateral connections and the last layer, which run for slow frames alone, are not counted.
    """
    side, width = settings.size // 2 + settings.size % 2, settings.width
    macs = side**2 * width * 3 * 5 * 7 * 7
    side = (side - 1) // 2 + 1
    channels = width
    for level, count in enumerate(settings.blocks):
        outputs, inner = width * 4 << level, width << level
        for block in range(count):
            before = side
            if level and not block:
                side = (side - 1) // 2 + 1
            if channels != outputs or side != before:
                macs += side**2 * channels * outputs
            macs += before**2 * channels * inner * 3 + side**2 * (inner * inner * 9 + inner * outputs)
            channels = outputs
    return 2 * macs
