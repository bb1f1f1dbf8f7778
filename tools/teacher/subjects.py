"""All subjects, by the name that the scripts' ``--teacher`` takes."""

from tools.second_teacher.subject import SECOND
from tools.teacher.demo import DEMO

SUBJECTS = {"demo": DEMO, "second": SECOND}
