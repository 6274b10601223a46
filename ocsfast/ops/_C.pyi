from typing import TypedDict

class BuildInfo(TypedDict):
    version: str
    cuda: bool
    cuda_version: str
    cuda_archs: str
    compiler: str
    torch_target: str
    instruction_set: str

def release(number: int) -> None: ...
def build_info() -> BuildInfo: ...
