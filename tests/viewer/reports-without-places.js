// To be appended to OHIF's app-config.js. OHIF 3.13 gives up on a whole report where one of its measurement groups has no
// coordinates, such as 'nodule: absent' or a score of the whole image; with this it passes over such a group and shows
// the others.
window.config.customizationService.push({
  onBeforeSRAddMeasurement: {
    $set: ({ measurement }) => {
      if (!measurement.coords.length) {
        measurement.coords = [{}];
      }
      return measurement;
    },
  },
});
