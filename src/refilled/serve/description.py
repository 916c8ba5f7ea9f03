"""The description of the API in the OpenAPI format."""

from typing import Any

from refilled.words import count_of

_PROBABILITY = {"type": "number", "minimum": 0, "maximum": 1}


def openapi(max_bytes: int, max_files: int) -> dict[str, Any]:
    """Return the OpenAPI document of the server."""
    from importlib.metadata import version

    picture = {"type": "string", "format": "binary"}
    error = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": "refilled", "version": version("refilled")},
        "paths": {
            "/predict": {
                "post": {
                    "summary": "Classify pictures",
                    "parameters": [
                        {
                            "name": "top",
                            "in": "query",
                            "description": "Number of classes in probabilities. Default: all.",
                            "schema": {"type": "integer", "minimum": 1},
                        }
                    ],
                    "requestBody": {
                        "required": True,
                        "description": f"At most {max_bytes} bytes, and {count_of(max_files, 'picture')}.",
                        "content": {
                            "multipart/form-data": {
                                "schema": {
                                    "type": "object",
                                    "properties": {"picture": {"type": "array", "items": picture}},
                                }
                            },
                            "application/octet-stream": {"schema": picture},
                            "image/*": {"schema": picture},
                        },
                    },
                    "responses": {
                        "200": _json(
                            "One entry per picture, in their order",
                            {"$ref": "#/components/schemas/Answer"},
                        ),
                        "400": {"description": "Empty or damaged", **error},
                        "413": {"description": "Too many bytes or pixels", **error},
                        "415": {"description": "Not a picture in a known format", **error},
                        "503": {"description": "Too many pictures are waiting", **error},
                    },
                }
            },
            "/health": {"get": {"summary": "State and limits", "responses": {"200": _json("Ready", {})}}},
            "/thumbnails/{row}": {
                "get": {
                    "summary": "A training image",
                    "parameters": [{"name": "row", "in": "path", "required": True, "schema": {"type": "integer"}}],
                    "responses": {
                        "200": {"description": "PNG", "content": {"image/png": {}}},
                        "404": {"description": "No such image", **error},
                    },
                }
            },
        },
        "components": {
            "schemas": {
                "Error": {"type": "object", "properties": {"error": {"type": "string"}}, "required": ["error"]},
                "Answer": {
                    "type": "object",
                    "properties": {
                        "predictions": {"type": "array", "items": {"$ref": "#/components/schemas/Prediction"}}
                    },
                },
                "Prediction": {
                    "type": "object",
                    "description": "Either class, probability and probabilities, or error and status.",
                    "properties": {
                        "name": {"type": ["string", "null"]},
                        "class": {"type": "string"},
                        "probability": _PROBABILITY,
                        "probabilities": {"type": "object", "additionalProperties": _PROBABILITY},
                        "nearest": {"type": "array", "items": {"type": "object"}},
                        "teacher": {"type": "array", "items": {"type": "object"}},
                        "error": {"type": "string"},
                        "status": {"type": "integer"},
                    },
                },
            }
        },
    }


def _json(description: str, schema: dict[str, Any]) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"schema": schema}}}
