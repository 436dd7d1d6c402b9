"""The words on pictures in the languages that a site can choose (`House.language`).

Every language has every word: a missing one is an error of types. The names of findings stay as the manifest has them,
and numbers have a decimal point in every language, so that a page says to the letter what the report says.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, fields

from node.report.house import Language
from node.report.sr import round_number


@dataclass(frozen=True, kw_only=True)
class Words:
    """The fixed texts of one language; `{...}` stands for what is filled in."""

    # What was done
    colon: str  # as it follows a word
    model: str
    study: str
    series: str
    images: str
    acquisition: str
    analysis: str
    thickness: str
    spacing: str
    kernel: str
    remarks: str
    threshold: str  # {percent}
    more: str  # {count}
    further: str  # measurements that have no room
    counted: str  # {count} images
    shown: str  # {shown} of {count}, of slices

    # What is shown
    slice: str
    slices: str
    frame: str
    frames: str
    image: str
    axial: str
    sagittal: str
    coronal: str
    enlarged: str

    # What was found
    finding: str
    not_found: str
    no_score: str
    none: str  # of several classes
    nothing_found: str
    nothing_excluded: str

    # What was not
    no_result: str
    not_applicable: str
    failed: str
    reason: str
    undetermined: str
    not_normal: str

    # Measurements, by the names that they have in the rows
    volume: str
    mean: str
    standard_deviation: str
    minimum: str
    maximum: str
    median: str
    percentile: str
    mesh_volume: str
    surface_area: str
    area: str
    maximum_3d_diameter: str
    longest_diameter: str
    perpendicular_diameter: str
    certainty: str
    size: str
    column: str
    row: str

    def measurement(self, name: str) -> str:
        """The word for a measurement by its name in the rows (`Measured.rows`), such as "standard deviation" or
        "percentile 10"; a name without a word stays as it is.
        """
        plain = re.sub(r" \d+$", "", name)
        keyword = plain.replace(" ", "_").lower()
        if keyword not in _KEYWORDS:
            return name
        return getattr(self, keyword) + name[len(plain) :]


_KEYWORDS = {field.name for field in fields(Words)}


CATALOGUE: dict[Language, Words] = {
    "en": Words(
        colon=":",
        model="Model",
        study="Study",
        series="Series",
        images="Images",
        acquisition="Acquired",
        analysis="Analysed",
        thickness="thickness",
        spacing="spacing",
        kernel="kernel",
        remarks="Remarks of the run",
        threshold="Threshold of certainty: {percent} %",
        more="and {count} more in the structured report",
        further="further measurements in the structured report",
        counted="{count} images",
        shown="{shown} of {count} slices with findings",
        slice="slice",
        slices="slices",
        frame="frame",
        frames="frames",
        image="image",
        axial="axial",
        sagittal="sagittal",
        coronal="coronal",
        enlarged="enlarged",
        finding="Finding",
        not_found="not found",
        no_score="no score",
        none="none",
        nothing_found="Analysed: nothing found",
        nothing_excluded="The model found nothing of what it looks for. This does not rule out disease.",
        no_result="No result",
        not_applicable="not applicable",
        failed="failed",
        reason="Reason",
        undetermined="Undetermined",
        not_normal="No result is not a normal result. Read the images as if no model had been run.",
        volume="volume",
        mean="mean",
        standard_deviation="SD",
        minimum="minimum",
        maximum="maximum",
        median="median",
        percentile="percentile",
        mesh_volume="mesh volume",
        surface_area="surface",
        area="area",
        maximum_3d_diameter="max. 3D diameter",
        longest_diameter="longest diameter",
        perpendicular_diameter="perpendicular diameter",
        certainty="certainty",
        size="size",
        column="column",
        row="row",
    ),
    "de": Words(
        colon=":",
        model="Modell",
        study="Untersuchung",
        series="Serie",
        images="Bilder",
        acquisition="Aufnahme",
        analysis="Auswertung",
        thickness="Schichtdicke",
        spacing="Schichtabstand",
        kernel="Kernel",
        remarks="Hinweise zum Lauf",
        threshold="Schwelle der Sicherheit: {percent} %",
        more="und {count} weitere im strukturierten Bericht",
        further="weitere Messwerte im strukturierten Bericht",
        counted="{count} Bilder",
        shown="{shown} von {count} Schichten mit Befunden",
        slice="Schicht",
        slices="Schichten",
        frame="Einzelbild",
        frames="Einzelbilder",
        image="Bild",
        axial="axial",
        sagittal="sagittal",
        coronal="koronar",
        enlarged="vergrößert",
        finding="Befund",
        not_found="nicht gefunden",
        no_score="kein Wert",
        none="keine",
        nothing_found="Ausgewertet: nichts gefunden",
        nothing_excluded="Das Modell hat nichts von dem gefunden, wonach es sucht. "
        "Das schließt eine Erkrankung nicht aus.",
        no_result="Kein Ergebnis",
        not_applicable="nicht anwendbar",
        failed="fehlgeschlagen",
        reason="Grund",
        undetermined="Nicht beurteilt",
        not_normal="Kein Ergebnis ist kein Normalbefund. Die Bilder sind zu befunden, als wäre kein Modell angewendet "
        "worden.",
        volume="Volumen",
        mean="Mittelwert",
        standard_deviation="Std.-Abw.",
        minimum="Minimum",
        maximum="Maximum",
        median="Median",
        percentile="Perzentil",
        mesh_volume="Netzvolumen",
        surface_area="Oberfläche",
        area="Fläche",
        maximum_3d_diameter="max. 3D-Durchmesser",
        longest_diameter="längster Durchmesser",
        perpendicular_diameter="senkrechter Durchmesser",
        certainty="Sicherheit",
        size="Größe",
        column="Spalte",
        row="Zeile",
    ),
    "es": Words(
        colon=":",
        model="Modelo",
        study="Estudio",
        series="Serie",
        images="Imágenes",
        acquisition="Adquisición",
        analysis="Análisis",
        thickness="grosor",
        spacing="intervalo",
        kernel="filtro",
        remarks="Observaciones de la ejecución",
        threshold="Umbral de certeza: {percent} %",
        more="y {count} más en el informe estructurado",
        further="más mediciones en el informe estructurado",
        counted="{count} imágenes",
        shown="{shown} de {count} cortes con hallazgos",
        slice="corte",
        slices="cortes",
        frame="fotograma",
        frames="fotogramas",
        image="imagen",
        axial="axial",
        sagittal="sagital",
        coronal="coronal",
        enlarged="ampliado",
        finding="Hallazgo",
        not_found="no encontrado",
        no_score="sin puntuación",
        none="ninguna",
        nothing_found="Analizado: no se ha encontrado nada",
        nothing_excluded="El modelo no ha encontrado nada de lo que busca. Esto no descarta una enfermedad.",
        no_result="Sin resultado",
        not_applicable="no aplicable",
        failed="fallido",
        reason="Motivo",
        undetermined="Sin determinar",
        not_normal="La ausencia de resultado no es un resultado normal. Las imágenes deben interpretarse como si no se "
        "hubiera ejecutado ningún modelo.",
        volume="volumen",
        mean="media",
        standard_deviation="desv. est.",
        minimum="mínimo",
        maximum="máximo",
        median="mediana",
        percentile="percentil",
        mesh_volume="volumen de malla",
        surface_area="superficie",
        area="área",
        maximum_3d_diameter="diámetro 3D máx.",
        longest_diameter="diámetro mayor",
        perpendicular_diameter="diámetro perpendicular",
        certainty="certeza",
        size="tamaño",
        column="columna",
        row="fila",
    ),
    "fr": Words(
        colon=" :",
        model="Modèle",
        study="Examen",
        series="Série",
        images="Images",
        acquisition="Acquisition",
        analysis="Analyse",
        thickness="épaisseur",
        spacing="intervalle",
        kernel="filtre",
        remarks="Remarques sur l'exécution",
        threshold="Seuil de certitude : {percent} %",
        more="et {count} de plus dans le rapport structuré",
        further="autres mesures dans le rapport structuré",
        counted="{count} images",
        shown="{shown} coupes sur {count} avec résultats",
        slice="coupe",
        slices="coupes",
        frame="vue",
        frames="vues",
        image="image",
        axial="axiale",
        sagittal="sagittale",
        coronal="coronale",
        enlarged="agrandie",
        finding="Résultat",
        not_found="non trouvé",
        no_score="pas de score",
        none="aucune",
        nothing_found="Analyse effectuée : rien de trouvé",
        nothing_excluded="Le modèle n'a rien trouvé de ce qu'il recherche. Cela n'exclut pas une pathologie.",
        no_result="Aucun résultat",
        not_applicable="non applicable",
        failed="échec",
        reason="Motif",
        undetermined="Indéterminé",
        not_normal="L'absence de résultat n'est pas un résultat normal. Les images sont à interpréter comme si aucun "
        "modèle n'avait été exécuté.",
        volume="volume",
        mean="moyenne",
        standard_deviation="écart type",
        minimum="minimum",
        maximum="maximum",
        median="médiane",
        percentile="percentile",
        mesh_volume="volume du maillage",
        surface_area="surface externe",
        area="aire",
        maximum_3d_diameter="diamètre 3D max.",
        longest_diameter="plus grand diamètre",
        perpendicular_diameter="diamètre perpendiculaire",
        certainty="certitude",
        size="taille",
        column="colonne",
        row="ligne",
    ),
    "it": Words(
        colon=":",
        model="Modello",
        study="Esame",
        series="Serie",
        images="Immagini",
        acquisition="Acquisizione",
        analysis="Analisi",
        thickness="spessore",
        spacing="intervallo",
        kernel="kernel",
        remarks="Note sull'esecuzione",
        threshold="Soglia di certezza: {percent} %",
        more="e altri {count} nel report strutturato",
        further="altre misure nel report strutturato",
        counted="{count} immagini",
        shown="{shown} strati su {count} con reperti",
        slice="strato",
        slices="strati",
        frame="fotogramma",
        frames="fotogrammi",
        image="immagine",
        axial="assiale",
        sagittal="sagittale",
        coronal="coronale",
        enlarged="ingrandito",
        finding="Reperto",
        not_found="non trovato",
        no_score="nessun punteggio",
        none="nessuna",
        nothing_found="Analizzato: nessun reperto trovato",
        nothing_excluded="Il modello non ha trovato nulla di ciò che cerca. Questo non esclude una patologia.",
        no_result="Nessun risultato",
        not_applicable="non applicabile",
        failed="non riuscito",
        reason="Motivo",
        undetermined="Non determinato",
        not_normal="L'assenza di risultato non è un risultato normale. Le immagini vanno refertate come se nessun "
        "modello fosse stato eseguito.",
        volume="volume",
        mean="media",
        standard_deviation="dev. st.",
        minimum="minimo",
        maximum="massimo",
        median="mediana",
        percentile="percentile",
        mesh_volume="volume della mesh",
        surface_area="superficie",
        area="area",
        maximum_3d_diameter="diametro 3D max.",
        longest_diameter="diametro maggiore",
        perpendicular_diameter="diametro perpendicolare",
        certainty="certezza",
        size="dimensioni",
        column="colonna",
        row="riga",
    ),
    "nl": Words(
        colon=":",
        model="Model",
        study="Onderzoek",
        series="Serie",
        images="Beelden",
        acquisition="Opname",
        analysis="Analyse",
        thickness="coupedikte",
        spacing="coupe-afstand",
        kernel="kernel",
        remarks="Opmerkingen bij de uitvoering",
        threshold="Zekerheidsdrempel: {percent} %",
        more="en nog {count} in het gestructureerde verslag",
        further="verdere metingen in het gestructureerde verslag",
        counted="{count} beelden",
        shown="{shown} van {count} coupes met bevindingen",
        slice="coupe",
        slices="coupes",
        frame="frame",
        frames="frames",
        image="beeld",
        axial="axiaal",
        sagittal="sagittaal",
        coronal="coronaal",
        enlarged="vergroot",
        finding="Bevinding",
        not_found="niet gevonden",
        no_score="geen score",
        none="geen",
        nothing_found="Geanalyseerd: niets gevonden",
        nothing_excluded="Het model heeft niets gevonden van wat het zoekt. Dit sluit ziekte niet uit.",
        no_result="Geen resultaat",
        not_applicable="niet van toepassing",
        failed="mislukt",
        reason="Reden",
        undetermined="Niet bepaald",
        not_normal="Geen resultaat is geen normaal resultaat. Beoordeel de beelden alsof er geen model is toegepast.",
        volume="volume",
        mean="gemiddelde",
        standard_deviation="SD",
        minimum="minimum",
        maximum="maximum",
        median="mediaan",
        percentile="percentiel",
        mesh_volume="meshvolume",
        surface_area="buitenoppervlak",
        area="oppervlakte",
        maximum_3d_diameter="max. 3D-diameter",
        longest_diameter="langste diameter",
        perpendicular_diameter="loodrechte diameter",
        certainty="zekerheid",
        size="afmetingen",
        column="kolom",
        row="rij",
    ),
}


def show_number(value: float, unit: str) -> str:
    """A number in the digits that a reader can use, with a decimal point in every language.

    It is rounded as in the report first, so that both agree to the digit shown. Hounsfield units, millimetres and
    percent have one digit after the point; of other numbers there are three digits that count, or as many as stand
    before the point and one more. Whole numbers without a unit, such as a slice's, stay whole. What is a billion or
    more is in powers of ten: no measurement of a body, and no line that fits a page.
    """
    value = round_number(value)
    size = abs(value)
    if size >= 1e9:
        return f"{value:.4g}"
    if unit in ("HU", "mm", "%", "px"):
        digits = 1
    elif not unit and value == int(value):
        digits = 0
    elif size < 1:
        digits = 3
    elif size < 10:
        digits = 2
    else:
        digits = 1 if size < 10000 else 0
    shown = f"{value:.{digits}f}"
    return shown.removeprefix("-") if float(shown) == 0 else shown
